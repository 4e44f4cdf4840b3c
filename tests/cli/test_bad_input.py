"""What is wrong is said in one line, with exit code 2; nothing is left that looks like a result."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.support.commands import TINY_MODEL_WORDS, Outcome, routing, run_here, run_there, small_trace, tiny_trace

LRU = "+hardware=a100 +policy=lru"
ADAPTIVE = "+hardware=a100 +policy=adaptive"
TRANSITION = f"{ADAPTIVE} policy/predictor=transition"
THRESHOLD = f"{ADAPTIVE} policy/selection=threshold"


class Bad(NamedTuple):
    """A command that must be refused, and what its line must name; {trace} is a sound trace."""

    words: str
    names: tuple[str, ...]


def by_words(cases: list[Bad]) -> list[Any]:
    """Parameters named by their words."""
    return [pytest.param(case, id=case.words.replace(" ", ",")) for case in cases]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_trace(tmp_path_factory.mktemp("sound") / "sound.safetensors")


def assert_refused(found: Outcome, names: tuple[str, ...]) -> None:
    """One line, code 2, no result; the line names each of `names`."""
    lines = found.err.strip().splitlines()
    assert (found.code, len(lines)) == (2, 1), found.err or found.out
    assert lines[0].startswith("error: ")
    assert [name for name in names if name not in lines[0]] == [], lines[0]
    assert "Traceback" not in found.err + found.out
    left = sorted(path.name for path in found.folder.iterdir()) if found.folder.is_dir() else []
    assert not {"DONE", "metrics.json", "provenance.json"} & set(left)


def refuse(words: str, trace: Path, folder: Path, names: tuple[str, ...]) -> None:
    told = words.replace("{trace}", str(trace)).split()
    if not any(word.startswith("trace") for word in told):
        told.append(f"trace.path={trace}")
    if not any(word.startswith("compare=") for word in told):
        told.append("compare=none")
    assert_refused(run_here(told, folder), names)


# -- configuration -------------------------------------------------------------------------------------------

CHOICES = [
    Bad("+policy=lru", ("hardware is not chosen", "+hardware=NAME", "a100", "ideal_link")),
    Bad("+hardware=a100", ("policy is not chosen", "+policy=NAME", "adaptive", "two_level")),
    Bad("+hardware=a1000 +policy=lru", ("hardware=a1000", "did you mean a100?", "gh200")),
    Bad("+hardware=a100 +policy=lruu", ("policy=lruu", "did you mean lru?", "adaptive")),
    Bad("hardware=a100 +policy=lru", ("hardware", "+hardware=NAME")),
    Bad("+hardware=a100 policy=lru", ("policy", "+policy=NAME")),
    Bad(f"{LRU} model=gpt-oss", ("model=gpt-oss", "did you mean gpt-oss-120b?", "gpt-oss-20b")),
    Bad(f"{LRU} stack=fast", ("stack=fast", "eager, found, graph")),
    Bad(f"{LRU} trace=mine", ("trace=mine", "default")),
    Bad(f"{LRU} policy/predictor=best", ("policy/predictor=best", "transition")),
    Bad(f"{LRU} policy/horizon=far", ("policy/horizon=far", "adaptive")),
    Bad(f"{LRU} policy/selection=all", ("policy/selection=all", "top_k")),
    Bad(f"{LRU} policy/eviction=lruu", ("policy/eviction=lruu", "did you mean lru?")),
    Bad(f"{LRU} policy/order=any", ("policy/order=any", "index")),
    Bad(f"{LRU} start=warm", ("start='warm'", "cold, popular, resident")),
    Bad(f"{LRU} compare=some", ("compare='some'", "full, floor, none")),
    Bad(f"{LRU} policy.transfer.memory=disk", ("policy.transfer.memory='disk'", "pinned", "pageable")),
    Bad(f"{LRU} policy.eviction.scope=town", ("scope='town'", "global", "layer")),
    Bad(f"{LRU} policy.eviction=lru", ("policy.eviction", "policy/eviction=NAME")),
    Bad(f"{LRU} policy.eviction=null", ("policy.eviction", "policy/eviction=NAME")),
    Bad(f"{LRU} policy.predictor=null", ("policy.predictor=null", "policy/predictor=NAME", "none")),
]
KEYS = [
    Bad(f"{LRU} resdency=0.5", ("resdency is no key (did you mean residency?)", "`expertflow keys` lists them")),
    Bad(f"{LRU} trace.num_token=4", ("trace.num_token is no key (did you mean trace.num_tokens?)",)),
    Bad(f"{LRU} policy.evicton=lru", ("policy.evicton is no key (did you mean policy.eviction?)",)),
    Bad(f"{LRU} policy/evicton=lru", ("policy/evicton is no group (did you mean policy/eviction?)",)),
    Bad(f"{LRU} policy.eviction.scop=layer", ("policy.eviction.scop is no key (did you mean policy.eviction.scope?)",)),
    Bad(f"{LRU} model.num_layers=4", ("model.num_layers means nothing with model=auto", "name the model")),
    Bad(f"{LRU} foo=1", ("foo is no key", "`expertflow keys` lists them")),
    Bad(f"{LRU} +foo=1", ("foo is no key", "batch_size", "hardware", "more")),
    Bad(f"{LRU} +model.foo=1", ("model.foo", "is no key", "expert_bits")),
    Bad(f"{LRU} +hardware.foo=1", ("hardware.foo", "is no key", "tflops")),
    Bad(f"{LRU} +stack.foo=1", ("stack.foo", "layer_overhead_ns")),
    Bad(f"{LRU} policy.horizon.foo=1", ("policy.horizon.foo", "is no key")),
    Bad(f"{LRU} +policy.horizon.foo=1", ("policy.horizon", "foo")),
    Bad(f"{LRU} +policy.foo=1", ("policy.foo", "eviction")),
    Bad(f"{LRU} +policy.transfer.foo=1", ("policy.transfer.foo", "staging_slots")),
    Bad(f"{LRU} trace.foo=1", ("trace.foo", "is no key")),
    Bad(f"{LRU} +trace.foo=1", ("trace.foo", "num_tokens")),
    Bad(f"{LRU} storage.gb_per_s=0.01", ("storage.gb_per_s=0.01", "there is none; add +storage=NAME")),
    Bad(f"{LRU} +storage.latency_ns=5", ("storage.latency_ns=5", "there is none; add +storage=NAME")),
    Bad(f"{LRU} host.host_tflops=2", ("host.host_tflops=2", "say hardware.host_tflops=2")),
    Bad(f"{LRU} policy.place.layers=4", ("policy.place.layers=4", "no place was chosen", "+policy/place=host_layers")),
    Bad(
        f"{LRU} policy.horizon.max_distance=3",
        ("policy.horizon.max_distance is no key of FixedHorizon", "policy/horizon=adaptive, adaptive_patient"),
    ),
    Bad(f"{LRU} policy.predictor.fitted=x", ("policy.predictor.fitted is no key", "policy/predictor=forest, hybrid")),
    Bad(f"{ADAPTIVE} policy.predictor.fitted=x", ("policy.predictor.fitted", "choose policy/predictor=hybrid")),
    Bad("+hardware=a100 +policy=clairvoyant policy.eviction.scope=layer", ("policy.eviction", "a whole policy")),
    Bad(f"{LRU} ~residency", ("residency cannot be taken out", "another value")),
]
VALUES = [
    Bad(f"{LRU} residency=0", ("residency=0", "(0, 1]")),
    Bad(f"{LRU} residency=-1", ("residency=-1", "(0, 1]")),
    Bad(f"{LRU} residency=1.5", ("residency=1.5", "(0, 1]")),
    Bad(f"{LRU} residency=nan", ("residency=nan", "(0, 1]")),
    Bad(f"{LRU} residency=half", ("residency='half'", "(0, 1]")),
    Bad(f"{LRU} residency=0.5 gpu_memory_gb=20", ("residency=0.5", "gpu_memory_gb=20", "leave one out")),
    Bad(f"{LRU} residency=0.0001", ("residency=0.0001", "no slot", "0.001302")),
    Bad(f"{LRU} gpu_memory_gb=1", ("gpu_memory_gb=1", "no slot", "at least 5.1")),
    Bad(f"{LRU} gpu_memory_gb=-3", ("gpu_memory_gb=-3", "[0.001, 100000] GB")),
    Bad(f"{LRU} gpu_memory_gb=lots", ("gpu_memory_gb='lots'", "number in [0.001, 100000] GB")),
    Bad(f"{LRU} batch_size=0", ("batch_size=0", "[1, 65536]")),
    Bad(f"{LRU} batch_size=1.5", ("batch_size=1.5", "whole number in [1, 65536]")),
    Bad(f"{LRU} prefill_chunk=0", ("prefill_chunk=0", "[1, 1e+06]")),
    Bad(f"{LRU} max_tokens=0", ("max_tokens=0", "[1, 2147483647]")),
    Bad(f"{LRU} chunk_mib=0", ("chunk_mib=0", "[0.0009765625, 4096] MiB")),
    Bad(f"{LRU} chunk_mib=-1", ("chunk_mib=-1", "[0.0009765625, 4096] MiB")),
    Bad(f"{LRU} chunk_mib=nan", ("chunk_mib=nan", "[0.0009765625, 4096] MiB")),
    Bad(f"{LRU} chunk_mib=1e-9", ("chunk_mib=1e-09", "[0.0009765625, 4096] MiB")),
    Bad(f"{LRU} chunk_mib=0.000976", ("chunk_mib=0.000976", "[0.0009765625, 4096] MiB")),
    Bad(f"{LRU} chunk_mib=4097", ("chunk_mib=4097", "[0.0009765625, 4096] MiB")),
    # 80 * 2^30 bytes are 85.899 GB.
    Bad(f"{LRU} gpu_memory_gb=85.9", ("gpu_memory_gb=85.9", "more than the GPU has", "hardware.memory_gb=80.0")),
    Bad(f"{LRU} start=resident", ("start=resident", "residency=1.0", "start=popular")),
    Bad(f"{LRU} start=resident gpu_memory_gb=20", ("start=resident", "residency=1.0", "start=popular")),
    Bad(f"{LRU} channel_depth=0", ("channel_depth=0", "[1, 1024]")),
    Bad(f"{LRU} hardware.link_gb_per_s=0", ("hardware.link_gb_per_s=0", "[0.0001, 1e+06] GB/s or inf")),
    Bad(f"{LRU} hardware.link_gb_per_s=-1", ("hardware.link_gb_per_s=-1", "[0.0001, 1e+06] GB/s or inf")),
    Bad(f"{LRU} hardware.link_gb_per_s=nan", ("hardware.link_gb_per_s=nan", "[0.0001, 1e+06] GB/s or inf")),
    Bad(f"{LRU} hardware.pageable_gb_per_s=0", ("hardware.pageable_gb_per_s=0", "[0.0001, 1e+06] GB/s or inf")),
    Bad(f"{LRU} hardware.memory_gb_per_s=-5", ("hardware.memory_gb_per_s=-5", "[1e-06, 1e+06] GB/s")),
    Bad(f"{LRU} hardware.link_latency_ns=1.5", ("hardware.link_latency_ns=1.5", "whole number")),
    Bad(f"{LRU} count_redundant=maybe", ("count_redundant='maybe'", "true or false")),
    Bad(f"{LRU} timeline=1", ("timeline=1", "true or false")),
    Bad(f"{LRU} seed=-1", ("seed=-1", "[0, 2^63 - 1]")),
    Bad(f"{LRU} warmup_forwards=12", ("warmup_forwards=12", "12 forwards")),
    Bad(f"{LRU} warmup_forwards=-1", ("warmup_forwards=-1", "[0, 2147483647]")),
    Bad(f"{LRU} policy.transfer.staging_slots=-1", ("policy.transfer.staging_slots=-1", "[0, 65536]")),
    Bad(f"{LRU} policy.transfer.staging_slots=1.5", ("policy.transfer.staging_slots=1.5", "whole number")),
    Bad(f"{LRU} policy.transfer.serial=maybe", ("policy.transfer.serial='maybe'", "true or false")),
]
RESIDENT = "start=resident residency=1.0"
LIMITS = [RESIDENT, f"{RESIDENT} chunk_mib=0.0124", "chunk_mib=4096", "gpu_memory_gb=80"]
"""Values on the right side of a limit above."""
PARTS = [
    Bad(f"{THRESHOLD} policy.selection.probability=2", ("policy.selection", "probability=2", "(0, 1]")),
    Bad(f"{THRESHOLD} policy.selection.probability=often", ("policy.selection.probability='often'", "number in")),
    Bad(f"{ADAPTIVE} policy/selection=mass policy.selection.mass=0", ("policy.selection", "mass=0", "(0, 1]")),
    Bad(
        f"{ADAPTIVE} policy/selection=top_k policy.selection.extra=0.5", ("policy.selection.extra=0.5", "whole number")
    ),
    Bad(f"{ADAPTIVE} policy/horizon=fixed_4 policy.horizon.depth=99", ("99 layers ahead", "at most 23")),
    Bad(
        f"{ADAPTIVE} policy/horizon=stride_2 policy.horizon.distances=[0]",
        ("policy.horizon.distances=[0]", "[1, 9999]"),
    ),
    Bad(f"{ADAPTIVE} policy.horizon.max_distance=0", ("policy.horizon", "max_distance=0")),
    Bad(f"{ADAPTIVE} policy.horizon.max_distance=1.5", ("policy.horizon.max_distance=1.5", "whole number")),
    Bad(f"{ADAPTIVE} policy.horizon.stall_threshold=nan", ("policy.horizon.stall_threshold=nan", "whole number")),
    Bad(f"{ADAPTIVE} policy.horizon.dist_exponent=-1", ("policy.horizon.dist_exponent=-1", "[0, 100]")),
    Bad(f"{ADAPTIVE} policy.horizon.dist_exponent=nan", ("policy.horizon.dist_exponent=nan", "[0, 100]")),
    Bad(f"{ADAPTIVE} policy.horizon.count=3", ("policy.horizon.count=3", "any, late")),
    Bad(f"{ADAPTIVE} policy.horizon.count=some", ("policy.horizon.count='some'", "any, late")),
    Bad(
        f"{ADAPTIVE} policy/eviction=two_level_lru policy.eviction.high_share=0",
        ("policy.eviction", "high_share=0", "(0, 1]"),
    ),
    Bad(f"{LRU} residency=0.01 policy/eviction=lru_per_layer", ("num_slots=7", "24 layers", "raise residency")),
    Bad(f"{ADAPTIVE} policy/predictor=noisy_oracle policy.predictor.a=2", ("policy.predictor", "a=2", "[0, 1]")),
    Bad(
        f"{ADAPTIVE} policy/predictor=noisy_oracle policy.predictor.seed=-1",
        ("policy.predictor.seed=-1", "[0, 2^63 - 1]"),
    ),
    Bad(
        f"{ADAPTIVE} policy/predictor=lookahead",
        ("policy/predictor=lookahead", "the trace sound has none", "policy/predictor=transition"),
    ),
    Bad(f"{TRANSITION} policy.predictor.max_distance=0", ("policy.predictor", "max_distance=0")),
    Bad(f"{TRANSITION} policy.predictor.smoothing=nan", ("policy.predictor.smoothing=nan", "[1e-06, 1e+06]")),
    Bad(f"{TRANSITION} policy.predictor.cross=nan", ("policy.predictor.cross=nan", "[0, 100]")),
    Bad(f"{TRANSITION} policy.predictor.keep=-1", ("policy.predictor.keep=-1", "[0, 65535] experts")),
    Bad(
        f"{TRANSITION} policy.predictor.fitted_start=/absent.safetensors",
        ("policy.predictor.fitted_start='/absent.safetensors'", "no such file", "auto, null"),
    ),
    Bad("+hardware=a100 +policy=clairvoyant policy.lookahead=0", ("policy.lookahead=0", "[1, 1e+06]")),
]


@pytest.mark.mostly_slow(keep=4)
@pytest.mark.parametrize("case", by_words(CHOICES + KEYS + VALUES + PARTS))
def test_a_broken_configuration_is_one_line(case: Bad, sound: Path, tmp_path: Path) -> None:
    refuse(case.words, sound, tmp_path / "run", case.names)


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("words", LIMITS)
def test_the_last_value_within_a_limit_is_accepted(words: str, sound: Path, tmp_path: Path) -> None:
    told = [*LRU.split(), f"trace.path={sound}", "compare=none", "max_tokens=1", *words.split()]
    assert run_here(told, tmp_path / "run").done


GRAMMAR = [
    Bad(f"{LRU} residency=[0.5", ("'residency=[0.5'", "key=value", "(in quotes)")),
    Bad(f"{LRU} turbo", ("'turbo'", "key=value")),
    Bad(f"{LRU} +hardware.link_gb_per_s=3", ("hardware.link_gb_per_s", "leave out the plus sign")),
]


@pytest.mark.parametrize("case", by_words(GRAMMAR))
def test_what_hydra_cannot_parse_is_one_line(case: Bad, sound: Path, tmp_path: Path) -> None:
    refuse(case.words, sound, tmp_path / "run", case.names)


# -- traces --------------------------------------------------------------------------------------------------


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON header and the data of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def with_header(raw: bytes, **changes: str) -> bytes:
    """The same file with other header strings."""
    table, data = header_of(raw)
    table["__metadata__"] |= changes
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


def with_values(raw: bytes, array: str, first: bytes) -> bytes:
    """The same file with the first bytes of one array replaced."""
    table, data = header_of(raw)
    begin = table[array]["data_offsets"][0]
    length = int.from_bytes(raw[:8], "little")
    return raw[: 8 + length] + data[:begin] + first + data[begin + len(first) :]


Break = Callable[[bytes], bytes]
BROKEN: dict[str, tuple[Break, tuple[str, ...]]] = {
    "truncated": (lambda raw: raw[:-40], ("truncated", "write the file again")),
    "cut in the header": (lambda raw: raw[:60], ("truncated",)),
    "zero bytes": (lambda raw: b"", ("is empty (0 bytes)",)),
    "too many bytes": (lambda raw: raw + b"xx", ("2 bytes after the last array",)),
    "wrong token total": (lambda raw: with_header(raw, num_tokens="13"), ("[12, 24, 4]", "[13, 24, 4]")),
    "wrong layer total": (lambda raw: with_header(raw, num_layers="23"), ("experts", "[12, 24, 4]", "[12, 23, 4]")),
    "a total that is no number": (lambda raw: with_header(raw, top_k="four"), ("top_k", "'four'")),
    "no tokens": (lambda raw: with_header(raw, num_tokens="0"), ("empty", "at least one token")),
    "another version": (lambda raw: with_header(raw, format_version="9"), ("format_version", "'9'", "update")),
    "no trace": (lambda raw: with_header(raw, format="weights"), ("'weights'", "format=expertflow-trace")),
    "expert out of range": (lambda raw: with_values(raw, "experts", b"\x20"), ("experts row 0, layer 0", "0 … 31")),
    "expert twice": (lambda raw: with_values(raw, "experts", b"\x01\x01"), ("experts row 0, layer 0", "twice")),
    "padding first": (lambda raw: with_values(raw, "experts", b"\xff"), ("experts row 0, layer 0", "padding")),
    "NaN weight": (lambda raw: with_values(raw, "weights", b"\x00\x7e"), ("weights row 0, layer 0", "nan")),
    "negative weight": (lambda raw: with_values(raw, "weights", b"\x00\xbc"), ("weights row 0, layer 0", "-1")),
    "requests that start late": (lambda raw: with_values(raw, "request_start", b"\x01"), ("request_start row 0",)),
    "prompt too long": (lambda raw: with_values(raw, "prompt_len", b"\x63"), ("prompt_len row 0", "99")),
    "a pickle": (lambda raw: pickle.dumps({"experts": list(range(99))}), ("pickle", "not a safetensors file")),
    "text": (lambda raw: b"token,layer,expert\n" * 9, ("not a safetensors file", "import")),
}


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_trace_is_one_line_that_names_file_place_and_remedy(kind: str, tmp_path: Path) -> None:
    breaks, names = BROKEN[kind]
    weights = np.full((12, 24, 4), 0.25, np.float16)
    path = small_trace(tmp_path / "broken.safetensors", weights=weights)
    path.write_bytes(breaks(path.read_bytes()))
    refuse(f"{LRU} trace.path={path}", path, tmp_path / "run", (f"{path}: ", *names))


def test_the_traces_above_are_sound_before_they_are_broken(tmp_path: Path) -> None:
    weights = np.full((12, 24, 4), 0.25, np.float16)
    path = small_trace(tmp_path / "whole.safetensors", weights=weights)
    whole = path.read_bytes()
    path.write_bytes(with_values(with_header(whole), "experts", header_of(whole)[1][:1]))
    assert run_here([*LRU.split(), f"trace.path={path}", "compare=none"], tmp_path / "run").done


PATHS = [
    Bad(f"{LRU} trace.path=/absent/x.safetensors", ("/absent/x.safetensors", "does not exist", "check the path")),
    Bad(f"{LRU} trace.path=/", ("/", "is a folder", "*.safetensors")),
    Bad(f"{LRU} trace.path=/absent/*.safetensors", ("/absent/*.safetensors", "matches no file")),
    Bad(f"{LRU} trace.path=[]", ("trace.path=[]", "a list of files")),
    Bad(f"{LRU} trace.path=[{{trace}},/absent/y.safetensors]", ("/absent/y.safetensors", "does not exist")),
    Bad(f"{LRU} trace.path=3", ("trace.path=3", "a list of files")),
    Bad(f'{LRU} trace.path=""', ("trace.path=''", "a list of files")),
    Bad(f"{LRU} trace.num_requests=9999", ("trace.num_requests=9999", "at least one token")),
    Bad(f"{LRU} trace.num_tokens=0", ("trace.num_tokens=0", "[1, 1e+06] tokens")),
    Bad(f"{LRU} trace.seed=-1", ("trace.seed=-1", "[0, 2^63 - 1]")),
]


@pytest.mark.mostly_slow(keep=2)
@pytest.mark.parametrize("case", by_words(PATHS))
def test_a_trace_that_is_not_there_is_one_line(case: Bad, sound: Path, tmp_path: Path) -> None:
    refuse(case.words, sound, tmp_path / "run", case.names)


def test_files_that_disagree_are_not_chained(sound: Path, tmp_path: Path) -> None:
    other = small_trace(tmp_path / "other.safetensors", shape=(24, 32, 2))
    refuse(f"{LRU} trace.path=[{sound},{other}]", sound, tmp_path / "run", (str(other), "top_k is 2", "4"))


# -- trace and model -----------------------------------------------------------------------------------------


def test_a_model_that_the_trace_names_and_nobody_knows_is_one_line(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors")
    refuse(LRU, path, tmp_path / "run", ("'tiny'", "model=NAME", "deepseek-moe-16b", "more"))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("mixtral-8x7b", ("model=mixtral-8x7b", "num_layers=32", "num_layers=24", "model=auto")),
        ("qwen1.5-moe-a2.7b", ("num_experts=60", "num_experts=32", "model=auto")),
    ],
)
def test_a_model_that_does_not_fit_the_trace_is_one_line(
    model: str, names: tuple[str, ...], sound: Path, tmp_path: Path
) -> None:
    refuse(f"{LRU} model={model}", sound, tmp_path / "run", names)


def test_a_trace_that_chooses_more_experts_than_its_model_is_one_line(tmp_path: Path) -> None:
    path = small_trace(tmp_path / "six.safetensors", experts=routing((24, 32, 6), 12))
    refuse(LRU, path, tmp_path / "run", ("top_k=4", "top_k=6"))


def test_a_model_with_a_missing_figure_is_one_line(tmp_path: Path) -> None:
    path = tiny_trace(tmp_path / "tiny.safetensors")
    words = [word for word in TINY_MODEL_WORDS if "num_heads" not in word]
    refuse(" ".join([LRU, *words]), path, tmp_path / "run", ("model lacks num_heads",))


def test_counts_fitted_on_another_model_are_one_line(tmp_path: Path) -> None:
    from sim.paths import DATA

    path = tiny_trace(tmp_path / "tiny.safetensors")
    warm = f"policy.predictor.transition.fitted_start={DATA / 'gpt-oss-20b.transition.safetensors'}"
    words = " ".join([ADAPTIVE, *TINY_MODEL_WORDS, warm])
    refuse(words, path, tmp_path / "run", ("transition counts", "(24, 32)", "(4, 8)", "the same model"))


@pytest.mark.slow
def test_a_warm_start_that_is_no_safetensors_file_is_one_line(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "warm").write_text("counts")
    words = f"{TRANSITION} policy.predictor.fitted_start={tmp_path / 'warm'}"
    refuse(words, sound, tmp_path / "run", ("warm: file: is not a safetensors file", "fit-predictor"))


# -- the output folder, and true processes -------------------------------------------------------------------


def test_an_output_folder_below_a_file_is_one_line(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    found = run_here([*LRU.split(), f"trace.path={sound}"], tmp_path / "taken" / "run")
    assert_refused(found, (str(tmp_path / "taken" / "run"),))


def test_an_output_folder_below_a_file_names_the_key(sound: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    found = run_here([*LRU.split(), f"trace.path={sound}"], tmp_path / "taken" / "run")
    assert_refused(found, ("hydra.run.dir",))


@pytest.mark.slow
def test_a_process_elsewhere_says_the_same_with_code_2(tmp_path: Path) -> None:
    found = run_there([*LRU.split(), "trace.path=absent.safetensors"], tmp_path / "run", cwd=tmp_path)
    assert_refused(found, ("absent.safetensors", "does not exist"))


@pytest.mark.slow
def test_a_process_without_arguments_lists_the_choices(tmp_path: Path) -> None:
    assert_refused(run_there([], tmp_path / "run", cwd=tmp_path), ("+hardware=NAME", "a100"))


@pytest.mark.slow
def test_a_failed_job_of_a_sweep_ends_it_with_one_line_and_code_2(sound: Path, tmp_path: Path) -> None:
    words = ["-m", *LRU.split(), f"trace.path={sound}", "compare=none", "residency=0.5,2", "hydra.launcher.n_jobs=1"]
    found = run_there([*words, f"hydra.sweep.dir={tmp_path / 'sweep'}"], tmp_path / "run", cwd=tmp_path)
    assert found.code == 2, found.err
    lines = found.err.strip().splitlines()
    assert lines == ["error: residency=2 is outside (0, 1]"]
    # It is found before the first run.
    assert not list((tmp_path / "sweep").rglob("metrics.json"))
