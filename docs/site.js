// Tables of the leaderboard: a click on a heading sorts, the lists above filter. Without scripts the table stands as it is written.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll("[data-standings]")) {
    const table = box.querySelector("table"), body = table.tBodies[0], said = box.querySelector("[aria-live]");
    const value = (row, k) => {
      const text = row.cells[k].dataset.value ?? row.cells[k].textContent.trim(), number = Number(text);
      return text === "" ? null : Number.isNaN(number) ? text.toLowerCase() : number;
    };
    [...table.tHead.rows[0].cells].forEach((cell, k) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = cell.textContent;
      cell.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = cell.getAttribute("aria-sort") === "descending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        cell.setAttribute("aria-sort", down ? "ascending" : "descending");
        const sign = down ? 1 : -1;
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [value(a, k), value(b, k)];
          if (x === null || y === null) return (x === null) - (y === null); // what was not measured stays last
          return sign * (typeof x === typeof y && x < y ? -1 : x > y ? 1 : 0);
        });
        body.append(...rows);
      });
    });
    const choose = () => {
      const wanted = [...box.querySelectorAll("select")].map((each) => [each.name, each.value]);
      let shown = 0;
      for (const row of body.rows) {
        row.hidden = !wanted.every(([name, value]) => !value || row.dataset[name] === value);
        shown += !row.hidden;
      }
      said.textContent = `${shown} of ${body.rows.length} rows`;
    };
    for (const each of box.querySelectorAll("select")) each.addEventListener("change", choose);
    choose();
  }
});
