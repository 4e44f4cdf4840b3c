"""Every file of `conf/study` is read, and each of its cells composes and can be made into a policy's parts."""

from pathlib import Path

import pytest

from sim.job.configure import configure
from sim.paths import config_files
from sim.study.plan import Study, cells, load_study, read_study
from tests.support.studies import write_study

NAMES = sorted(config_files("study"))


def values(study: Study) -> dict[str, str]:
    return {name: "some.safetensors" for name in study.parameters if name not in study.defaults}


def test_the_studies_are_there() -> None:
    assert {"paper", "inversion", "ablation", "estimates", "gap"} <= set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_override_of_a_study_composes(name: str) -> None:
    """Each variant once, and each value of each axis once: axes and variants set different keys."""
    study = load_study(name)
    found = cells(study, values(study))
    first = found[0].place
    for cell in found:
        changed = sum(one != other for one, other in zip(cell.place, first, strict=True))
        if changed == 0 or (changed == 1 and cell.variant == found[0].variant):
            assert configure([*cell.overrides, "compare=none"])["policy"]["name"]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_a_study_differs_from_the_others(name: str) -> None:
    study = load_study(name)
    assert len(set(study.variants.values())) == len(study.variants)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": []}, "claim is no key of a study"),
        ({"kind": "walks"}, "kind='walks' is unknown"),
        ({"about": None}, "about: one sentence"),
        ({"variants": ["lru"]}, "map names to lists"),
        ({"optional": ["forest"]}, "optional names the variant forest"),
        ({"claims": [{"variants": ["lfu"]}]}, "claims names the variant lfu"),
        ({"best": [{"of": ["lru"], "variant": "mru"}]}, "best names the variant mru"),
        ({"tables": [{"heading": "x"}]}, "tables has no key heading"),
    ],
)
def test_a_mistake_in_a_file_is_named(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_study(write_study(tmp_path, **changes))
    assert "tiny.yaml" in str(error.value)


def test_a_sweep_is_one_variant_a_value(tmp_path: Path) -> None:
    swept = {"policy/eviction=two_level_lru policy.eviction.high_share": [0.5, 0.75], "policy/order": ["index"]}
    study = read_study(write_study(tmp_path, sweeps={"lru": swept}))
    assert study.variants["high_share=0.5"] == (
        "+policy=lru",
        "policy/eviction=two_level_lru",
        "policy.eviction.high_share=0.5",
    )
    assert study.variants["order=index"] == ("+policy=lru", "policy/order=index")
    assert list(study.variants)[-3:] == ["high_share=0.5", "high_share=0.75", "order=index"]


def test_cells_are_every_place_times_every_variant(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path))
    found = cells(study, {"recording": "r.st"}, ["seed=1"])
    assert len(found) == 2 * 6
    assert str(found[-1]) == "model=small stack=graph variant=perfect"
    assert found[1].overrides == (
        "+hardware=a100",
        "residency=0.25",
        "trace.path=r.st",
        "stack=eager",
        "+policy=lru",
        "seed=1",
    )
    only = cells(study, {"recording": "r.st"}, only={"variant": ["lru"], "stack": ["graph"]})
    assert [str(cell) for cell in only] == ["model=small stack=graph variant=lru"]


def test_a_default_stands_in_for_a_parameter_and_gives_way(tmp_path: Path) -> None:
    study = read_study(write_study(tmp_path, defaults={"recording": "default.st"}))
    assert "trace.path=default.st" in cells(study, {})[0].overrides
    assert "trace.path=own.st" in cells(study, {"recording": "own.st"})[0].overrides
