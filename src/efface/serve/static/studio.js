// The studio: draws through the images API with the key that was entered, and compares two keys on the same seeds.

const $ = (id) => document.getElementById(id);
const SEEDS = 2 ** 32;
const DELIVERED = new Set(["drawn", "redrawn", "logged"]); // the outcomes of a row that has a picture
const keys = []; // [{key, me}], the second one to compare with
let running = null; // the AbortController of the current request

function element(name, fields = {}, ...children) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children);
  return made;
}

function words(error) {
  if (error instanceof TypeError) return "The server does not answer. Check that it runs, and try again.";
  return error.message;
}

function say(text) { $("status").textContent = text; }

function fail(text) {
  $("error").textContent = text ?? "";
  $("error").hidden = !text;
}

async function call(key, path, options = {}) {
  const headers = { authorization: `Bearer ${key}`, ...options.headers };
  const answer = await fetch(path, { ...options, headers, credentials: "omit", cache: "no-store" });
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => null);
  throw new Error(body?.error?.message ?? `The server answered ${answer.status}. Try again.`);
}

// ---------------------------------------------------------------- keys

function rules(me) {
  if (me.policy.unguarded) return "erases nothing (unguarded)";
  return `erases ${me.policy.erase.join(", ")}${me.policy.gate ? "; a detector checks each picture" : ""}`;
}

function showPolicies() {
  const lines = keys.flatMap(({ me }, i) => [
    element("dt", { textContent: i ? "Second key" : "Key" }),
    element("dd", { textContent: `${me.tenant}, policy ${me.policy.name} version ${me.policy.version}: ${rules(me)}` }),
  ]);
  $("policies").replaceChildren(...lines);
  $("policies").hidden = !lines.length;
}

function showForm() {
  const me = keys[0].me;
  $("n").max = me.most_images;
  $("steps").max = me.most_steps;
  if (!$("steps").value) $("steps").value = me.steps;
  $("size").replaceChildren(...me.sizes.map((size) => element("option", { value: size, textContent: size })));
  const boxes = me.concepts.map((name) =>
    element("label", {}, element("input", { type: "checkbox", value: name }), name));
  $("concepts").replaceChildren(...boxes);
  $("compare").checked = keys.length > 1;
  showCompare();
  $("ask").hidden = false;
}

const chosen = () => [...$("concepts").querySelectorAll("input:checked")].map((box) => box.value);

function showCompare() {
  const more = chosen();
  $("compare").disabled = keys.length < 2 && !more.length;
  if ($("compare").disabled) $("compare").checked = false;
  $("compare-with").textContent = keys.length > 1
    ? `with the second key, which ${rules(keys[1].me)}`
    : more.length ? `without erasing ${more.join(", ")}` : "(enter a second key, or choose what else to erase)";
}

async function useKeys() {
  keys.length = 0;
  $("ask").hidden = true;
  fail();
  for (const key of [$("key").value.trim(), $("other").value.trim()].filter(Boolean)) {
    keys.push({ key, me: await (await call(key, "/v1/efface/me")).json() });
  }
  showPolicies();
  showForm();
  $("own").open = false;
}

function forget(error) {
  keys.length = 0;
  showPolicies();
  fail(words(error));
  $("own").open = true;
}

$("keys").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await useKeys();
    $("prompt").focus();
  } catch (error) {
    forget(error);
  }
});

// ---------------------------------------------------------------- drawing

function request(more) {
  const body = { prompt: $("prompt").value, n: Number($("n").value), steps: Number($("steps").value), stream: true };
  body.size = $("size").value;
  if ($("negative").value) body.negative_prompt = $("negative").value;
  if (more.length) body.also_erase = more;
  return body;
}

// Reads server-sent events: progress comes as comments, pictures and errors as data.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += value ?? "";
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const step = /^: step (\d+) of (\d+)$/.exec(part);
      if (step) yield { step: Number(step[1]), steps: Number(step[2]) };
      for (const line of part.split("\n").filter((each) => each.startsWith("data: ") && each !== "data: [DONE]")) {
        yield JSON.parse(line.slice(6));
      }
    }
    if (done) return;
  }
}

async function draw(key, body, signal, told) {
  const headers = { "content-type": "application/json" };
  const answer = await call(key, "/v1/images/generations", { method: "POST", headers, body: JSON.stringify(body), signal });
  const pictures = [];
  let facts = null;
  for await (const event of events(answer)) {
    if (event.error) throw new Error(event.error.message);
    if (event.step !== undefined) told(event.step, event.steps);
    if (event.b64_json) {
      pictures.push(`data:image/${event.output_format};base64,${event.b64_json}`);
      facts = event.efface;
    }
  }
  if (!facts) throw new Error("The answer ended before the pictures came. Draw again.");
  return { ...facts, pictures: facts.rows.map((row) => (DELIVERED.has(row.outcome) ? pictures.shift() : null)) };
}

function arms() {
  const more = chosen();
  const found = [{ key: keys[0].key, more, name: `policy ${keys[0].me.policy.name}${more.length ? " and more" : ""}` }];
  if ($("compare").checked) {
    const { key, me } = keys.at(-1);
    found.push({ key, more: [], name: `policy ${me.policy.name}` });
  }
  return found;
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  const seed = $("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] % (SEEDS - 100) : Number($("seed").value);
  const used = arms(), steps = used.map(() => [0, 1]);
  running = new AbortController();
  fail();
  say("Waiting for the server.");
  $("go").disabled = true;
  $("stop").hidden = $("progress").hidden = false;
  $("progress").removeAttribute("value");
  const told = (i) => (step, all) => {
    steps[i] = [step, all];
    const share = steps.reduce((sum, [a, b]) => sum + a / b, 0) / steps.length;
    $("progress").value = share;
    say(`Drawing, ${Math.round(100 * share)} %.`);
  };
  try {
    const asked = used.map(({ more }) => ({ ...request(more), seed }));
    const made = await Promise.all(used.map(({ key }, i) => draw(key, asked[i], running.signal, told(i))));
    show(used, asked, made, seed);
    const n = made[0].rows.length, missing = made.flatMap((each) => each.pictures).filter((each) => !each).length;
    say(`${n} picture${n > 1 ? "s" : ""}${used.length > 1 ? " each" : ""}, from seed ${seed}.${missing ? ` ${missing} blocked.` : ""}`);
  } catch (error) {
    const stopped = running.signal.aborted;
    running.abort(); // also the other arm
    if (stopped) say("Stopped.");
    else { say(""); fail(words(error)); }
  } finally {
    running = null;
    $("go").disabled = false;
    $("stop").hidden = $("progress").hidden = true;
  }
});

$("stop").addEventListener("click", () => running?.abort());

// ---------------------------------------------------------------- pictures

function acted(row) {
  const names = row.acted.flatMap((each) => each.concepts);
  const found = { redrawn: ", drawn again with more strength", logged: ", but a detector still finds it" }[row.outcome] ?? "";
  return (names.length ? `erased ${[...new Set(names)].join(", ")}` : "nothing erased") + found;
}

function picture(url, alt) {
  if (!url) return element("div", { className: "blocked", textContent: "Blocked: a detector found an erased concept." });
  const made = element("img", { src: url, alt });
  made.addEventListener("load", () => made.classList.toggle("small", made.naturalWidth <= 160));
  return made;
}

function figure(used, made, prompt, seed, i) {
  const alts = used.map(({ name }, k) => `Picture ${i + 1} for “${prompt}”, ${name}, ${acted(made[k].rows[i])}`);
  const urls = made.map((each) => each.pictures[i]);
  const frame = element("div", { className: "frame" });
  const parts = [frame];
  if (used.length > 1 && urls.every(Boolean)) {
    frame.append(picture(urls[1], alts[1]), picture(urls[0], alts[0]));
    const slider = element("input", { type: "range", min: 0, max: 100, value: 50 });
    slider.setAttribute("aria-label", `Picture ${i + 1}: left of the line ${used[1].name}, right of it ${used[0].name}`);
    slider.addEventListener("input", () => frame.style.setProperty("--at", `${slider.value}%`));
    parts.push(slider);
  } else {
    used.forEach((_, k) => frame.append(picture(urls[k], alts[k])));
    if (used.length > 1) frame.classList.add("apart");
  }
  const caption = element("figcaption", {}, `Seed ${seed + i}`);
  for (const k of [...used.keys()].reverse()) { // what is compared with is on the left
    const side = used.length > 1 ? `${k ? "Left" : "Right"}, ${used[k].name}: ` : "";
    const line = element("div", {}, `${side}${acted(made[k].rows[i])}. `);
    const download = `efface-${seed + i}-${made[k].policy.slice(0, 8)}.png`;
    if (urls[k]) line.append(element("a", { href: urls[k], download, textContent: `Save${side ? (k ? " left" : " right") : ""}` }));
    caption.append(line);
  }
  return element("li", {}, element("figure", {}, ...parts, caption));
}

function show(used, asked, made, seed) {
  const items = made[0].rows.map((_, i) => figure(used, made, $("prompt").value, seed, i));
  $("made").replaceChildren(...items);
  const record = used.map(({ name }, k) => ({ arm: name, request: asked[k], job: made[k].job, policy: made[k].policy, rows: made[k].rows }));
  $("record").href = `data:application/json;charset=utf-8,${encodeURIComponent(JSON.stringify(record, null, 1))}`;
  $("record").hidden = false;
}

$("blur").addEventListener("click", () => {
  const on = $("blur").getAttribute("aria-pressed") !== "true";
  $("blur").setAttribute("aria-pressed", on);
  $("made").classList.toggle("blurred", on);
});
$("concepts").addEventListener("change", showCompare);

// Keys behind the # of the address, which `efface studio` prints. They are taken out of the address at once.
const given = new URLSearchParams(location.hash.slice(1));
if (given.has("key")) {
  history.replaceState(null, "", location.pathname);
  $("key").value = given.get("key");
  $("other").value = given.get("other") ?? "";
  useKeys().catch(forget);
}
