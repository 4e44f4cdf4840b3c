"""`python -m traces record`: from a folder and a file of prompts to a trace, and every error as one line."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sim.specs.model_file import read_model_file
from tests.support.traces import check_error, run
from tests.unit.recorder.models import build
from traces.format import open_trace
from traces.recorder import command
from traces.stream import TraceWriter, folder_of

TOKENS = [[5, 9, 2, 33, 17, 40], [7], [1, 60, 8, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a dense first layer, and a tokenizer of words."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "Tiny-Model"
    build("qwen2_moe").save_pretrained(path)
    words = {word: number for number, word in enumerate(("[UNK]", "the", "cat", "sat", "user", ":", "on"))}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    outer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    outer.chat_template = "{% for message in messages %}{{ message.role }} : {{ message.content }}{% endfor %}"
    outer.save_pretrained(path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(TOKENS[0]), "", json.dumps({"tokens": TOKENS[1], "label": "née"}), json.dumps(TOKENS[2])]
    path.write_text("\n".join(lines) + "\n")
    return path


def call(capsys: pytest.CaptureFixture[str], folder: Path, prompts: Path, *words: str) -> tuple[int, str, str]:
    out = prompts.with_name("out.safetensors")
    capsys.readouterr()
    return run(capsys, "record", f"model={folder}", f"prompts={prompts}", f"out={out}", "overwrite=true", *words)


def test_a_recording_from_prompts_to_trace(folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, folder, prompts, "max_new_tokens=5", "batch_size=2", "logits=true", "lookahead=2")
    assert code == 0
    trace = open_trace(prompts.with_name("out.safetensors"))
    assert (trace.model, trace.num_layers, trace.num_experts, trace.top_k) == ("tiny-model", 3, 10, 4)
    sizes = read_model_file(prompts.with_name("out.config.json")).spec
    assert (sizes.num_layers, sizes.num_experts, sizes.top_k, sizes.num_dense_layers) == (3, 10, 4, 1)
    assert f"model.path={prompts.with_name('out.config.json')}" in " ".join(out.split())
    assert trace.prompt_len.tolist() == [6, 1, 4]
    assert np.diff(trace.request_start).tolist() == [10, 5, 8]
    assert trace.context_len is not None
    assert trace.context_len.tolist() == [0, 0, 0]
    assert trace.request_labels == ["line 1", "née", "line 4"]
    assert set(trace.layout_arrays()) == {
        "experts",
        "weights",
        "request_start",
        "prompt_len",
        "context_len",
        "forward_id",
        "token_ids",
        "embedding",
        "logits",
        "lookahead_ids",
        "lookahead_scores",
    }
    header = trace.header
    assert header["moe_layer_ids"] == "[1, 2, 3]"
    assert (header["architecture"], header["sampling"], header["dtype"]) == ("Qwen2MoeForCausalLM", "greedy", "float32")
    # Both pre-gates are printed, the better one is kept, and the header says which.
    recalls = json.loads(header["pregate_recall"])
    means = {kind: sum(values) for kind, values in recalls.items()}
    assert sorted(means) == ["normed", "residual"]
    assert header["pregate"] == max(("residual", "normed"), key=means.__getitem__)
    lines = out.splitlines()
    assert lines[0].endswith("out.safetensors: 3 requests, 23 tokens × 3 layers")
    assert lines[1].split() == ["recall@4", "d=1", "d=2"]
    assert lines[4].startswith("note: recorded with up to 2 requests in a forward; the nearest run: trace.path=")
    for line in lines[2:4]:
        kind = line.split()[0]
        assert ("(kept)" in line) == (kind == header["pregate"])
        shown = [float(text) / 100 for text in re.findall(r"([0-9.]+)%", line)]
        assert shown == pytest.approx(recalls[kind], abs=6e-4)
    check_recall(trace, recalls[header["pregate"]])
    check_embedding(trace)
    names = ["out.config.json", "out.safetensors", "prompts.jsonl"]
    assert sorted(item.name for item in prompts.parent.iterdir()) == names


def check_recall(trace: Any, recalls: list[float]) -> None:
    """Recall@K again, from what the trace holds."""
    experts, ids = trace.experts[:], trace.lookahead_ids[:]
    for distance, expected in enumerate(recalls, 1):
        guessed = ids[:, : trace.num_layers - distance, distance - 1, : trace.top_k]
        right = (experts[:, distance:, :, None] == guessed[:, :, None, :]).any(axis=3)
        assert right.mean() == pytest.approx(expected, abs=6e-5)


def check_embedding(trace: Any) -> None:
    """Equal tokens have equal rows, and the projection is the one the header describes."""
    table = build("qwen2_moe").get_input_embeddings().weight.detach().numpy()
    matrix = np.random.default_rng(0).standard_normal((24, 16), np.float32) / 4
    np.testing.assert_allclose(trace.embedding[:], table[trace.token_ids[:]] @ matrix, atol=1e-2)


@pytest.mark.slow
def test_the_same_command_writes_the_same_bytes_and_seed_and_sampling_count(
    folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    hot = "sampling=temperature=1.5"
    for words in ((), (), (hot,), (hot,), (hot, "seed=1")):
        assert call(capsys, folder, prompts, "max_new_tokens=5", *words)[0] == 0
        found.append(prompts.with_name("out.safetensors").read_bytes())
    assert found[0] == found[1]
    assert found[2] == found[3]
    assert len(set(found)) == 3


@pytest.mark.parametrize(
    ("words", "present", "absent"),
    [
        (("lookahead=0", "embedding_dims=0"), "weights", "embedding lookahead lookahead_ids logits"),
        (("lookahead=1", "lookahead_top=all"), "lookahead", "lookahead_ids lookahead_scores"),
        (("lookahead=1", "lookahead_top=3", "dtype=bfloat16", "device=cpu"), "lookahead_ids", "lookahead"),
    ],
)
def test_what_is_recorded_is_chosen(
    words: tuple[str, ...],
    present: str,
    absent: str,
    folder: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = call(capsys, folder, prompts, "max_new_tokens=1", "max_prompts=2", "name=my-moe", *words)
    assert code == 0
    trace = open_trace(prompts.with_name("out.safetensors"))
    assert (trace.model, trace.num_requests, trace.num_tokens) == ("my-moe", 2, 7)
    assert not {*present.split()} - {*trace.layout_arrays()}
    assert not {*absent.split()} & {*trace.layout_arrays()}
    assert ("recall@" in out) == ("lookahead=1" in words)
    if "lookahead_top=3" in words:
        assert trace.lookahead_ids is not None
        assert trace.lookahead_ids.shape == (7, 3, 1, 3)
        assert trace.header["dtype"] == "bfloat16"


def test_texts_and_messages_become_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.jsonl"
    message = {"messages": [{"role": "user", "content": "the cat"}]}
    path.write_text("\n".join(map(json.dumps, ["the cat sat", {"prompt": "on dog"}, message])))
    assert call(capsys, folder, path, "max_new_tokens=1")[0] == 0
    trace = open_trace(tmp_path / "out.safetensors")
    assert trace.token_ids is not None
    starts = trace.request_start
    assert [trace.token_ids[a:b].tolist() for a, b in pairwise(starts)] == [
        [1, 2, 3],
        [6, 0],
        [4, 5, 1, 2],
    ]
    (tmp_path / "p.txt").write_text("the cat\n\nsat\n")
    assert call(capsys, folder, tmp_path / "p.txt", "max_new_tokens=1", "chat=true")[0] == 0
    trace = open_trace(tmp_path / "out.safetensors")
    assert trace.token_ids is not None
    assert trace.token_ids[:].tolist() == [4, 5, 1, 2, 4, 5, 3]


@pytest.mark.parametrize(
    ("content", "words", "parts"),
    [
        ("[1]", ("sampling=hot",), ("option sampling=hot must be greedy or temperature=",)),
        ("[1]", ("sampling=temperature=0",), ("sampling=temperature=0 must be",)),
        ("[1]", ("sampling=temperature=nan",), ("must be greedy or temperature",)),
        ("[1]", ("dtype=int8",), ("dtype=int8 is unknown; choose one of auto, float32",)),
        ("[1]", ("device=toaster",), ("on device=toaster cannot be loaded",)),
        ("[1]", ("lookahead=3",), ("lookahead=3 reaches past the model; its 3 MoE layers allow 2",)),
        ("[1]", ("lookahead_top=11",), ("lookahead_top=11 must lie in 1 … num_experts=10",)),
        ("[1]", ("lookahead_top=few",), ("lookahead_top=few must be a whole number from 1, or all",)),
        ("[1]", ("max_new_tokens=64",), ("line 1: has 1 tokens, with max_new_tokens=64 more than the model's 64",)),
        ("[1]", ("batch_size=0",), ("option batch_size=0 must be a whole number from 1",)),
        ("[1]", ("batchsize=2",), ("option 'batchsize' is unknown to record; known are model, prompts, out",)),
        ("[1]", ("--recover", "x"), ("--recover takes no options",)),
        ("", (), ("prompts.jsonl: file: holds no prompt",)),
        ("[1]\n[1, 61]", (), ("line 2: holds the token 61; ids are 0 … 60",)),
        ("[true]", (), ("line 1: holds the token True",)),
        ("[]", (), ("line 1: is an empty prompt",)),
        ("{", (), ("line 1: is no JSON",)),
        ("[" * 100_000, (), ("line 1: is no usable JSON (nested too deeply)",)),
        ("7", (), ("line 1: holds no prompt; give one of prompt, tokens, messages",)),
        ('{"prompt": [1]}', (), ("line 1: holds no prompt",)),
        ('{"prompt": "a", "tokens": [1]}', (), ("line 1: holds no prompt",)),
        ('{"tokens": [1], "label": 2}', (), ("line 1: has a label that is no text",)),
        ('{"tokens": [1], "label": "\\ud800"}', (), ("request_labels holds a broken character",)),
        ('{"messages": [3]}', (), ("prompt of line 1: cannot be turned into tokens",)),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    content: str,
    words: tuple[str, ...],
    parts: tuple[str, ...],
    folder: Path,
    prompts: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompts.write_text(content)
    given = words if any(word.startswith("max_new") for word in words) else ("max_new_tokens=1", *words)
    check_error(call(capsys, folder, prompts, *given), *parts)
    assert [item.name for item in prompts.parent.iterdir()] == ["prompts.jsonl"]


def test_models_that_cannot_be_read_and_missing_options(
    folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_error(call(capsys, Path("./no/such"), prompts), "model=no/such", "cannot be loaded")
    check_error(run(capsys, "record", "model=./no", f"prompts={prompts}", "out=y"), "model=./no is no folder")
    near = prompts.with_name("models") / "tiny"
    near.mkdir(parents=True)
    with monkeypatch.context() as inside:
        # Nothing of these is asked of the network, nor a library loaded for it.
        inside.setattr("traces.recorder.load.importlib", SimpleNamespace(import_module=pytest.fail))
        for parent, word, hint in (
            (near.parent.parent, "models/tinyy", "though models is one (did you mean models/tiny?)"),
            (near.parent, "tinyy", "no name on the hub (ORG/NAME) (did you mean tiny?)"),
            (near.parent, "mixtral", "model=mixtral is no folder, and no name on the hub (ORG/NAME); check"),
        ):
            inside.chdir(parent)
            check_error(run(capsys, "record", f"model={word}", f"prompts={prompts}", "out=y"), hint)
    check_error(call(capsys, Path("../x y"), prompts), "model=../x y is no folder, and no name on the hub")
    check_error(call(capsys, prompts.parent, prompts), f"model={prompts.parent} on device=cpu cannot be loaded (")
    check_error(run(capsys, "record", "model=x", "out=y"), "option prompts is missing; write prompts=…")
    missing = prompts.with_name("none.jsonl")
    check_error(call(capsys, folder, missing), "none.jsonl: file: does not exist")
    check_error(
        run(capsys, "record", f"model={folder}", f"prompts={prompts}", "out=no/such/x"), "the folder no/such does not"
    )
    check_error(run(capsys, "record", "--recover", missing), "no unfinished recording of it")
    monkeypatch.setitem(sys.modules, "transformers", None)
    check_error(call(capsys, folder, prompts), "recording needs transformers; install it: pip install 'expertflow[rec")


def test_pickled_weights_are_not_read(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build("mixtral")
    model.config.save_pretrained(tmp_path / "m")
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    check_error(call(capsys, tmp_path / "m", prompts), "cannot be loaded", "safetensors")


def test_a_recording_that_breaks_off_can_be_recovered(
    folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = TraceWriter.append, []

    def fail(self: TraceWriter, **arrays: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, **arrays)

    monkeypatch.setattr(TraceWriter, "append", fail)
    code, text, err = call(capsys, folder, prompts, "max_new_tokens=2")
    assert (code, text) == (130, "")
    assert err.startswith("interrupted; what was whole is kept: python -m traces record --recover ")
    out = prompts.with_name("out.safetensors")
    assert not out.exists()
    check_error(call(capsys, folder, prompts, "max_new_tokens=2"), "an unfinished recording of it lies in")
    code, text, _ = run(capsys, "record", "--recover", out)
    assert (code, text.split(";")[0]) == (0, f"recovered {out}")
    trace = open_trace(out)
    assert (trace.num_requests, trace.header["recovered"], trace.request_labels) == (2, "true", ["line 1", "née"])
    assert trace.lookahead_ids is not None
    check_recall(trace, json.loads(trace.header["pregate_recall"])[trace.header["pregate"]])


@pytest.mark.slow
def test_kill_9_midway_then_recover_and_validate(folder: Path, prompts: Path) -> None:
    prompts.write_text("[1, 2, 3]\n" * 2000)
    out = prompts.with_name("out.safetensors")
    words = [f"model={folder}", f"prompts={prompts}", f"out={out}", "max_new_tokens=3"]
    child = subprocess.Popen([sys.executable, "-m", "traces", "record", *words], stderr=subprocess.DEVNULL)
    journal = folder_of(out) / "journal.json"
    limit = time.monotonic() + 60
    while time.monotonic() < limit and child.poll() is None:
        # Each replacement of the journal is whole: it can be read at any moment.
        if journal.exists() and json.loads(journal.read_text())["num_requests"] >= 3:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    for words in (["record", "--recover", str(out)], ["validate", str(out)]):
        done = subprocess.run([sys.executable, "-m", "traces", *words], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
    trace = open_trace(out)
    assert 3 <= trace.num_requests < 2000
    assert trace.num_tokens == 5 * trace.num_requests


def test_validating_needs_no_torch(prompts: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from traces import cli\n"
        "for words in (['validate', 'none'], ['record', 'model=x', 'prompts=none', 'out=y'], ['record', '--help']):\n"
        "    try: cli.main(words)\n"
        "    except SystemExit: pass\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr.count("none: file: does not exist") == 2
    assert "python -m traces record model=" in done.stdout.split("examples:")[1]


def test_the_help_of_the_command_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "record", "--help")
    assert code == 0
    assert "max_new_tokens=128 batch_size=1 sampling=greedy" in out
    assert all(f"{key}=" in out for key in command.REQUIRED)


def test_a_recording_that_is_there_is_kept_unless_it_is_to_be_replaced(
    folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = prompts.with_name("out.safetensors")
    out.write_bytes(b"mine")
    words = ("record", f"model={folder}", f"prompts={prompts}", f"out={out}", "max_new_tokens=2")
    check_error(run(capsys, *words), "out.safetensors", "is there already; name another, or give overwrite=true")
    assert out.read_bytes() == b"mine"
    code, said, _ = call(capsys, folder, prompts, "max_new_tokens=2", "batch_size=2")
    assert code == 0
    assert open_trace(out).num_requests == 3
    assert f"trace.path={out} batch_size=2" in said
