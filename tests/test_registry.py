"""Names, rooms and near matches. Extra methods are written to a folder that joins a room for one test."""

import importlib
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from textwrap import dedent

import pytest

import efface
import efface.erasers
from efface import registry

AddFile = Callable[[str, str], None]
AddPlugins = Callable[..., None]


@pytest.fixture
def add_file(tmp_path: Path) -> Iterator[AddFile]:
    """Writes a method file into the room `erasers`."""
    before = set(sys.modules)

    def add(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)

    efface.erasers.__path__.append(str(tmp_path))
    yield add
    efface.erasers.__path__.remove(str(tmp_path))
    for name in set(sys.modules) - before:
        if name.startswith("efface.erasers."):
            del sys.modules[name]


@pytest.fixture
def add_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AddFile]:
    """Writes a module of another distribution."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path / "site")

    def add(name: str, source: str) -> None:
        path = tmp_path / "site" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        importlib.invalidate_caches()

    yield add
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in {path.stem for path in (tmp_path / "site").iterdir()}:
            del sys.modules[name]


@pytest.fixture
def add_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[AddPlugins]:
    """Pretends that another distribution has these entry points."""

    def add(**values: str) -> None:
        entries = [EntryPoint(name.replace("__", "."), value, registry.GROUP) for name, value in values.items()]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries if group == registry.GROUP else [])

    shown = set(vars(efface))
    yield add
    for name in set(vars(efface)) - shown - set(efface.__all__):
        delattr(efface, name)


def test_the_first_methods_are_there() -> None:
    assert {"eiup", "gie", "negative_prompt", "safree", "sld"} <= set(registry.methods("erasers"))


@pytest.mark.parametrize("name", sorted(registry.methods()))
def test_every_method_resolves_to_the_class_in_its_own_file(name: str) -> None:
    found = registry.resolve(name)
    assert f"{found.__module__}.".startswith(f"efface.{registry.methods()[name]}.{name}.")
    assert registry.name_of(found) == name
    assert found.__name__.lower() == name.replace("_", "")


def test_a_new_file_is_a_new_method(add_file: AddFile) -> None:
    assert "brand_new" not in registry.methods()
    add_file("brand_new", "__all__ = ['BrandNew']\nclass Inner: ...\nclass BrandNew(Inner): ...\n")
    add_file("_private", "raise RuntimeError('never imported')\n")
    assert registry.methods()["brand_new"] == "erasers"
    assert registry.methods("erasers")["brand_new"] == "erasers"
    assert "brand_new" not in registry.methods("editors")
    assert "_private" not in registry.methods()
    assert registry.resolve("brand_new").__name__ == "BrandNew"
    assert registry.resolve("brand_new", "erasers") is registry.resolve("brand_new")


def test_listing_imports_no_method(add_file: AddFile) -> None:
    add_file("explosive", "raise RuntimeError('imported')\n")
    assert "explosive" in registry.methods()
    with pytest.raises(RuntimeError, match="imported"):
        registry.resolve("explosive")


@pytest.mark.parametrize(
    ("source", "has"),
    [
        ("class A: ...\n", "none"),
        ("__all__ = ['f']\ndef f(): ...\n", "none"),
        ("__all__ = ['A', 'B']\nclass A: ...\nclass B: ...\n", "A, B"),
    ],
)
def test_a_method_file_exports_exactly_one_class(add_file: AddFile, source: str, has: str) -> None:
    add_file("odd", source)
    with pytest.raises(
        TypeError, match=re.escape(f"`efface.erasers.odd` to export exactly one class in `__all__`, got {has}.")
    ):
        registry.resolve("odd")


def test_unknown_names_list_near_matches(add_file: AddFile) -> None:
    add_file("brand_new", "__all__ = ['BrandNew']\nclass BrandNew: ...\n")
    with pytest.raises(ValueError, match=r"Unknown method 'brand-nwe'. Did you mean 'brand_new'\? Known: .*brand_new"):
        registry.resolve("brand-nwe")
    with pytest.raises(ValueError, match=r"Unknown method 'zzzzzz'. Known: .*brand_new"):
        registry.resolve("zzzzzz")
    with pytest.raises(ValueError, match=r"Unknown method ''. Known: "):
        registry.resolve("")
    with pytest.raises(ValueError, match=r"Unknown room 'eraser'. Did you mean 'erasers'\? Known: erasers, editors"):
        registry.methods("eraser")
    with pytest.raises(ValueError, match="Unknown room 'models'"):
        registry.resolve("brand_new", "models")


def test_a_method_of_another_room_says_so(add_file: AddFile) -> None:
    add_file("brand_new", "__all__ = ['BrandNew']\nclass BrandNew: ...\n")
    with pytest.raises(ValueError, match="Expected one of the suites, got 'brand_new', which is one of the erasers"):
        registry.resolve("brand_new", "suites")


def test_other_distributions_add_methods(add_plugins: AddPlugins) -> None:
    add_plugins(editors__mine="collections:OrderedDict")
    assert registry.methods()["mine"] == "editors"
    assert registry.methods("editors")["mine"] == "editors"
    assert registry.resolve("mine").__name__ == "OrderedDict"
    add_plugins(editors__mine="math:tau")
    with pytest.raises(TypeError, match="`math:tau` to export exactly one class"):
        registry.resolve("mine")


def test_a_distribution_is_noticed_when_it_is_installed_and_when_it_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert "late" not in registry.methods("editors")
    info = tmp_path / "late-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[efface.methods]\neditors.late = collections:OrderedDict\n")
    assert registry.resolve("late", "editors") is OrderedDict
    shutil.rmtree(info)
    assert "late" not in registry.methods("editors")


def test_names_are_unique_across_rooms_and_distributions(add_file: AddFile, add_plugins: AddPlugins) -> None:
    add_file("twice", "__all__ = ['Twice']\nclass Twice: ...\n")
    add_plugins(editors__twice="collections:OrderedDict")
    with pytest.raises(ValueError, match=r"'twice' for efface\.erasers\.twice and collections:OrderedDict"):
        registry.methods()


@pytest.mark.parametrize("name", ["mine", "kitchens__mine", "erasers__", "erasers__mine__strong", "erasers__mine:Mine"])
def test_an_entry_point_without_a_room_is_refused(add_plugins: AddPlugins, name: str) -> None:
    add_plugins(**{name: "collections:OrderedDict"})
    with pytest.raises(
        ValueError, match=r"named <room>\.<name> .* \(collections:OrderedDict\) .*\. Correct or uninstall it"
    ):
        registry.methods()


# ---------------------------------------------------------------- names in records


@pytest.mark.parametrize("room", ["metrics", "suites"])
def test_metrics_and_suites_have_names_too(room: str) -> None:
    for name in registry.methods(room):
        assert registry.name_of(registry.resolve(name, room)) == name


def test_a_method_may_be_a_package(add_file: AddFile, tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    add_file("big/inside", "class Big: ...\nclass Helper: ...\n")
    add_file("big/__init__", '"A big one."\nfrom .inside import Big\n__all__ = ["Big"]\n')
    found = registry.resolve("big")
    assert (found.__module__, found.__name__) == ("efface.erasers.big.inside", "Big")
    assert registry.name_of(found) == "big"
    assert registry.about("erasers")["big"] == "A big one."
    helper = sys.modules["efface.erasers.big.inside"].Helper
    assert registry.name_of(helper) == "efface.erasers.big.inside:Helper"


def test_a_plugin_is_known_by_its_entry_point(add_plugins: AddPlugins, add_module: AddFile) -> None:
    add_module("plugged/inside", "class Mine: ...\nclass Other: ...\nOld = Other\n")
    add_module("plugged/__init__", "")
    add_module("plugged/shown", "from .inside import Mine\n")
    add_module("plugged/unrelated", "raise RuntimeError('imported')\n")
    add_module("stranger", "raise RuntimeError('imported')\n")
    add_plugins(
        erasers__first="stranger:Mine",
        erasers__second="plugged.unrelated:Third",
        erasers__mine="plugged.shown:Mine",
        editors__other="plugged.inside:Old",
    )
    inside = importlib.import_module("plugged.inside")
    assert registry.name_of(inside.Mine) == "mine"
    assert registry.name_of(inside.Other) == "other"
    assert registry.resolve("mine") is inside.Mine


def test_a_plugin_metric_is_recorded_by_its_entry_point(add_plugins: AddPlugins, add_module: AddFile) -> None:
    source = """
        import dataclasses

        @dataclasses.dataclass(frozen=True)
        class Mine:
            level: float = 0.5
            name, unit, higher_is_better = "mine", "share", None

            def __call__(self, samples, base=None):
                return []
    """
    add_module("plugged_metric", dedent(source))
    add_plugins(metrics__mine="plugged_metric:Mine")
    from efface import runs

    made = runs.make_metric("mine", level=0.25)
    assert runs.metric_config(made) == {"method": "mine", "level": 0.25}
    assert runs.make_metrics([runs.metric_config(made)]) == (made,)
    with pytest.raises(ValueError, match="mine has no field 'levle'. Did you mean 'level'"):
        runs.make_metric("mine", levle=1)
    with pytest.raises(ValueError, match="Expected `level` to be a finite number, got 'high'"):
        runs.make_metric("mine", level="high")


def test_a_class_that_is_not_registered_has_a_name_that_says_so() -> None:
    class Mine: ...

    name = registry.name_of(Mine)
    assert name == f"{__name__}:{Mine.__qualname__}"
    with pytest.raises(
        ValueError, match=r"is not registered by any package, .*Build the method in Python, or register"
    ):
        registry.resolve(name)
    assert registry.name_of(OrderedDict) == "collections:OrderedDict"


# ---------------------------------------------------------------- plug-ins as efface.Name


def test_a_plugin_is_an_attribute_of_efface(add_plugins: AddPlugins, add_module: AddFile) -> None:
    add_module("plugged_eraser", "class Mine: ...\n")
    add_plugins(erasers__mine="plugged_eraser:Mine", metrics__m="plugged_eraser:Measure")
    assert "Mine" in dir(efface) and "Measure" not in dir(efface)
    assert "plugged_eraser" not in sys.modules
    assert efface.Mine is registry.resolve("mine")
    with pytest.raises(AttributeError, match="no attribute 'Measure'"):
        efface.Measure  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'Mien'\. Did you mean 'Mine'\?"):
        efface.Mien  # noqa: B018


def test_two_plugins_of_one_class_name_are_both_named(add_plugins: AddPlugins) -> None:
    add_plugins(erasers__one="first:Mine", editors__two="second:Mine")
    assert dir(efface).count("Mine") == 1
    with pytest.raises(
        ImportError, match=r"Expected one class named `efface\.Mine`, got first:Mine and second:Mine\. Import"
    ):
        from efface import Mine  # noqa: F401
    add_plugins(erasers__one="collections:OrderedDict", editors__two="collections:OrderedDict")
    assert registry.plugin("OrderedDict") is OrderedDict


def test_native_names_win(add_plugins: AddPlugins) -> None:
    add_plugins(erasers__one="stranger:EIUP", erasers__two="stranger:api", erasers__three="stranger", odd="stranger:O")
    assert efface.EIUP.__module__ == "efface.erasers.eiup"
    assert set(dir(efface)) == set(efface.__all__)
    assert registry.plugin("api") is None
    from efface import api

    assert api.__name__ == "efface.api"


def test_near() -> None:
    names = ["eiup", "sld", "negative_prompt", "neon sign", "neon lamp"]
    assert registry.near("eipu", names) == "Did you mean 'eiup'?"
    assert registry.near("EIUP", names) == "Did you mean 'eiup'?"
    assert registry.near("negative-prompt", names) == "Did you mean 'negative_prompt'?"
    assert registry.near("neon", names) == "Did you mean 'neon sign' or 'neon lamp'?"
    assert registry.near("alcohol", names) == ""
    assert registry.near("", names) == ""
    assert registry.near("eiup", []) == ""
    assert registry.near("eiup", iter(["EIUP"])) == "Did you mean 'EIUP'?"
