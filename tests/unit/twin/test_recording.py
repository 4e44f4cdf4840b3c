"""Recording, small traces, the check and the command line, on a tiny twin."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from tests.unit.twin.tiny import documents, train, write_text
from traces.batching import RecordedRows
from traces.format import open_trace
from traces.reader import Trace
from traces.twin import checkpoint, cli
from traces.twin.check import check, pregate_recall
from traces.twin.compact import compact_lookahead, compact_trace
from traces.twin.model import Twin
from traces.twin.record import Plan, pieces, record, run_piece
from traces.twin.text import Tokenizer
from traces.twin.train import load_text

PLAN = Plan(tokens=(100, 60), prompt=6, decode=14, ahead=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A twin with a dense layer, trained a little and recorded."""
    base = tmp_path_factory.mktemp("twin")
    train(base / "twin", write_text(base / "text"), 20, "deepseek")
    record(base / "twin", PLAN, lambda line: None)
    return base / "twin"


@pytest.fixture(scope="module")
def model(folder: Path) -> Twin:
    return checkpoint.read_model(folder, checkpoint.read_settings(folder))[0]


def trace_of(folder: Path, split: str = "eval", kind: str = "residual") -> Trace:
    return open_trace(folder / f"tiny-twin-{split}.{kind}.safetensors")


def requests_of(trace: Trace) -> list[tuple[int, int]]:
    starts = trace.request_start.tolist()
    return list(itertools.pairwise(starts))


# -- full traces ---------------------------------------------------------------------------------------------


def test_a_recording_holds_requests_of_prefill_and_decode_and_says_what_it_is(folder: Path) -> None:
    for split, requests in (("train", 5), ("eval", 3)):
        trace = trace_of(folder, split)
        assert (trace.num_requests, trace.num_tokens) == (requests, 20 * requests)
        assert trace.prompt_len.tolist() == [6] * requests
        assert np.asarray(trace.lookahead).shape == (20 * requests, 3, 2, 8)
        assert np.asarray(trace.embedding).shape == (20 * requests, 16)
        assert trace.weights is not None
        header = trace.header
        assert json.loads(header["moe_layer_ids"]) == [1, 2, 3]
        assert (header["decode"], header["pregate"], header["split"]) == ("teacher-forced", "residual", split)
        assert "not a recording of the original" in header["source"]
        assert set(json.loads(header["pregate_recall"])) == {"residual", "normed"}


def test_recorded_documents_were_not_learned_and_splits_share_none(folder: Path) -> None:
    texts = documents(folder.parent / "text")
    names = {split: {document.name for document in some} for split, some in texts.items()}
    for split in ("train", "eval"):
        labels = trace_of(folder, split).request_labels
        assert labels is not None
        assert {label.rpartition("@")[0] for label in labels} <= names[split]
        assert len(set(labels)) == len(labels)


def test_pieces_do_not_overlap_and_are_of_their_documents(folder: Path) -> None:
    some = load_text(checkpoint.read_settings(folder))
    texts = {document.name: document.text for document in some}
    seen = set()
    for piece in pieces(some, Tokenizer(), 50):
        name, _, start = piece.label.rpartition("@")
        assert bytes(piece.tokens.tolist()).decode() == texts[name][int(start) : int(start) + 50]
        assert int(start) % 50 == 0
        seen.add(piece.label)
    assert len(seen) == sum(len(text) // 50 for text in texts.values())


def test_recorded_experts_and_weights_are_the_models_own(folder: Path, model: Twin) -> None:
    trace = trace_of(folder)
    for start, stop in requests_of(trace):
        tokens = torch.from_numpy(np.asarray(trace.token_ids[start:stop]).astype(np.int64))  # type: ignore[index]
        routing: list[tuple[torch.Tensor, torch.Tensor]] = []
        with torch.no_grad():
            model(tokens[None], routing=routing)
        for layer, (logits, ids) in enumerate(routing):
            np.testing.assert_array_equal(np.asarray(trace.experts[start:stop])[:, layer], ids.numpy())
            share = 4.0 * torch.softmax(logits, dim=1).gather(1, ids)
            stored = np.asarray(trace.weights[start:stop])[:, layer]  # type: ignore[index]
            np.testing.assert_allclose(stored, share.numpy(), rtol=2e-3)


def test_recorded_lookahead_is_a_later_router_applied_early(folder: Path, model: Twin) -> None:
    traces = {kind: trace_of(folder, kind=kind) for kind in ("residual", "normed")}
    start, stop = requests_of(traces["residual"])[1]
    tokens = torch.from_numpy(np.asarray(traces["residual"].token_ids[start:stop]).astype(np.int64))  # type: ignore[index]
    blocks = [block for _, block in model.moe_blocks]
    entering: list[torch.Tensor] = []
    handles = [b.mlp_norm.register_forward_pre_hook(lambda _, args: entering.append(args[0][0])) for b in blocks]
    with torch.no_grad():
        model(tokens[None])
        for handle in handles:
            handle.remove()
        for layer in range(3):
            for ahead in (1, 2):
                found = {kind: np.asarray(t.lookahead[start:stop])[:, layer, ahead - 1] for kind, t in traces.items()}  # type: ignore[index]
                if layer + ahead > 2:
                    assert all(np.isnan(values).all() for values in found.values())
                    continue
                target = blocks[layer + ahead]
                asked = {
                    "residual": target.mlp_norm(entering[layer]),
                    "normed": blocks[layer].mlp_norm(entering[layer]),
                }
                for kind, states in asked.items():
                    expected = target.router(states)[0].numpy()
                    np.testing.assert_allclose(found[kind], expected, rtol=2e-3, atol=2e-3)


def test_recording_again_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    again = Path(shutil.copytree(folder, tmp_path / "again"))
    for path in record(again, PLAN, lambda line: None):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_decode_token_by_token_routes_as_one_forward_over_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    record(own, Plan((40, 20), 6, 14, "sample", temperature=2.0), lambda line: None)
    trace = trace_of(own, "train")
    assert trace.forward_id is not None
    assert np.asarray(trace.forward_id[:]).tolist() == [0] * 6 + list(range(1, 15)) + [15] * 6 + list(range(16, 30))
    assert trace.header["decode"] == "temperature=2"
    forced = trace_of(folder, "train")
    # The prompts are the documents' own, what follows is the twin's.
    ids, others = np.asarray(trace.token_ids[:20]), np.asarray(forced.token_ids[:20])  # type: ignore[index]
    assert ids[:6].tolist() == others[:6].tolist()
    assert ids[6:].tolist() != others[6:].tolist()
    model, routing = checkpoint.read_model(own, checkpoint.read_settings(own))[0], []
    with torch.no_grad():
        model(torch.from_numpy(ids.astype(np.int64))[None], routing=routing)
    stored = np.sort(np.asarray(trace.experts[:20]), axis=2)
    whole = np.stack([ids.sort(dim=1).values.numpy() for _, ids in routing], axis=1)
    # Sums of a forward of one token round otherwise than those of many: two equal experts may swap.
    assert (stored == whole).mean() > 0.98


def test_greedy_decode_says_the_most_likely_token(folder: Path, model: Twin) -> None:
    piece = next(pieces(load_text(checkpoint.read_settings(folder)), Tokenizer(), 20))
    tokens, lengths = run_piece(model, piece, Plan(prompt=6, decode=3, how="greedy"), 0)
    assert (len(tokens), lengths) == (9, [6, 1, 1, 1])
    with torch.no_grad():
        assert int(model(torch.tensor([tokens[:6]]))[0, -1].argmax()) == tokens[6]


# -- small traces --------------------------------------------------------------------------------------------


def test_small_lookahead_is_the_full_one_within_a_255th(folder: Path, tmp_path: Path) -> None:
    source = folder / "tiny-twin-eval.residual.safetensors"
    full, small = open_trace(source), compact_trace(source, tmp_path / "small.safetensors", 10**6)
    assert small.lookahead_ids is not None
    assert np.asarray(small.lookahead_ids).shape == (60, 3, 2, 4)
    for name in ("experts", "weights", "token_ids", "embedding", "request_start", "prompt_len"):
        np.testing.assert_array_equal(np.asarray(getattr(small, name)), np.asarray(getattr(full, name)))
    assert small.header["pregate"] == "residual"
    assert small.request_labels == full.request_labels
    rows = range(60)
    for layer in range(3):
        exact, read = (RecordedRows(trace).lookahead(rows, layer) for trace in (full, small))
        assert exact is not None
        assert read is not None
        for ahead in range(2):
            if layer + ahead + 1 > 2:
                assert not read[:, ahead].any()
                continue
            one, other = exact[:, ahead], read[:, ahead]
            # The four best are listed: what is not is no better than the fourth.
            fourth = np.sort(one, axis=1)[:, -4, None]
            assert np.abs(one - other)[one > fourth].max() <= 1 / 255
            assert ((np.abs(one - other) <= 1 / 255) | (one <= fourth)).all()
            assert ((other > 0).sum(axis=1) <= 4).all()


def test_small_lookahead_of_numbers_done_by_hand() -> None:
    scores = np.full((1, 2, 1, 4), np.nan, np.float16)
    scores[0, 0, 0] = np.log([1, 2, 4, 1])
    ids, chances = compact_lookahead(scores, top_k=1)
    assert ids.dtype == np.uint8
    assert ids.tolist() == [[[[2, 1]], [[255, 255]]]]
    assert chances.tolist() == [[[[128, 64]], [[0, 0]]]]
    assert compact_lookahead(np.zeros((1, 2, 1, 256), np.float16), 2)[0].dtype == np.uint16
    assert compact_lookahead(np.zeros((1, 2, 1, 3), np.float16), 2)[0].shape[-1] == 3


def test_as_many_requests_are_kept_as_fit(folder: Path, tmp_path: Path) -> None:
    source, target = folder / "tiny-twin-train.normed.safetensors", tmp_path / "small.safetensors"
    whole = compact_trace(source, target, 10**6)
    assert whole.num_requests == 5
    kept = []
    for limit in range(9_000, 20_000, 500):
        kept.append(compact_trace(source, target, limit).num_requests)
        assert target.stat().st_size <= limit
    assert kept == sorted(kept)
    assert (kept[0], kept[-1]) == (1, 5)
    with pytest.raises(ValueError, match="not one request fits into 1000 bytes"):
        compact_trace(source, target, 1000)
    with pytest.raises(ValueError, match="lookahead: is missing"):
        compact_trace(target, tmp_path / "smaller.safetensors", 10**6)


# -- the check -----------------------------------------------------------------------------------------------


def test_the_check_compares_with_new_routers_and_keeps_the_numbers(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    before = load_file(next(own.glob("checkpoint-*")) / "model.safetensors")
    with (tmp_path / "out").open("w") as file:
        result = check(own, 60, "cpu", Console(file=file, width=120))
    assert json.loads((own / "check.json").read_text()) == result
    printed = (tmp_path / "out").read_text()
    assert "pre-gate recall@K, normed, d=2" in printed
    assert "entropy of a layer, min" in printed
    assert (result["tokens"], result["chance"], result["max_entropy_bits"]) == (60, 0.25, 3.0)
    trained, control = result["trained"], result["control"]
    stored = json.loads(trace_of(own).header["pregate_recall"])
    for kind in ("residual", "normed"):
        # From float16 scores against what was counted while recording.
        np.testing.assert_allclose(trained["pregate_recall"][kind], stored[kind], atol=0.01)
    assert trained != control
    after = load_file(next(own.glob("checkpoint-*")) / "model.safetensors")
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_perfect_pregate_recalls_everything_and_a_wrong_one_nothing(folder: Path) -> None:
    trace = trace_of(folder)
    experts = np.asarray(trace.experts[:])
    for factor, expected in ((1.0, 1.0), (-1.0, 0.0)):
        scores = np.full((60, 3, 2, 8), np.nan, np.float16)
        for layer in range(3):
            for ahead in (1, 2):
                if layer + ahead < 3:
                    scores[:, layer, ahead - 1] = 0
                    np.put_along_axis(scores[:, layer, ahead - 1], experts[:, layer + ahead].astype(int), factor, 1)
        trace.lookahead = scores
        assert pregate_recall(trace, 60) == [expected, expected]


def test_a_collapsed_router_is_found_out(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    settings = checkpoint.read_settings(own)
    model, state = checkpoint.read_model(own, settings)
    with torch.no_grad():
        for _, block in model.moe_blocks:
            block.router.weight.zero_()  # all tokens: the same experts
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.read_optimizer(own, model, optimizer, state["step"])
    checkpoint.write_checkpoint(own, model, optimizer, state)
    record(own, PLAN, lambda line: None)
    result = check(own, 60, "cpu", Console(file=(tmp_path / "out").open("w")))
    assert result["even"] is False
    assert result["trained"]["highest_load"] == 4.0


def test_a_check_of_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    train(own, folder.parent / "text", 21)
    with pytest.raises(ValueError, match="was recorded after 20 steps, the checkpoint has 21"):
        check(own, 60, "cpu", Console())


# -- the command line ----------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of one call."""
    try:
        code = cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.slow
def test_the_four_commands_in_turn(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin, text = tmp_path / "twin", folder.parent / "text"
    begun = ("gpt-oss-20b", "--width=16", "--context=24", "--tokenizer=bytes", f"--text={text}", "--batch=2")
    code, out, err = run(capsys, "train", twin, *begun, "--steps=2", "--log-every=1", "--threads=1")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("gpt-oss-20b-twin: 0.5 M parameters")
    assert out.splitlines()[1].startswith("step 1: 48 tokens, ")
    assert out.splitlines()[-1] == f"stopped at step 2; {twin} holds its checkpoint"
    code, out, err = run(capsys, "train", twin, *begun, "--steps=3", "--threads=1")
    assert (code, err) == (0, "")
    assert "from step 2" in out
    code, out, err = run(capsys, "record", twin, "--train-tokens=40", "--eval-tokens=40", "--prompt=8", "--decode=12")
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 4
    code, out, err = run(capsys, "check", twin)
    assert code in (0, 1)
    assert err == ""
    assert "learned: " in out
    small = tmp_path / "small"
    small.mkdir()
    code, out, err = run(capsys, "ship", small, twin, "--max-mb=0.8")
    assert (code, err) == (0, "")
    assert sorted(path.name for path in small.iterdir()) == [
        "gpt-oss-20b-twin-eval.safetensors",
        "gpt-oss-20b-twin-train.safetensors",
    ]
    assert sum(path.stat().st_size for path in small.iterdir()) < 800_000


@pytest.mark.mostly_slow(keep=3)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "the following arguments are required"),
        (("teach",), "invalid choice"),
        (("train", "{new}", "--steps=1"), "holds no twin yet; say which to begin: deepseek-v2-lite"),
        (("train", "{new}", "gpt-5", "--steps=1"), "topology 'gpt-5' is unknown"),
        (("train", "{new}", "gpt-oss-20b"), "say how long to train"),
        (("train", "{new}", "gpt-oss-20b", "--minutes=0"), "minutes=0.0 must be above 0"),
        (("train", "{new}", "gpt-oss-20b", "--minutes=nan"), "minutes=nan must be above 0"),
        (("train", "{new}", "gpt-oss-20b", "--steps=1", "--width=100"), "width=100 must be a multiple of 16"),
        (("train", "{new}", "gpt-oss-20b", "--steps=1", "--tokenizer=words"), "tokenizer='words' is unknown"),
        (("train", "{new}", "gpt-oss-20b", "--steps=1", "--text={new}"), "is no folder"),
        (("train", "{new}", "gpt-oss-20b", "--steps=1", "--device=abacus"), "device=abacus cannot be used"),
        (("train", "{new}", "gpt-oss-20b", "--steps=1", "--device=meta"), "device=meta"),
        (("train", "{new}/deeper", "gpt-oss-20b", "--steps=1", "--tokenizer=bytes"), "create its parent first"),
        (("train", "{twin}", "--steps=21", "--lr=0.5"), "--lr 0.5: "),
        (("train", "{twin}", "gpt-oss-20b", "--steps=21"), "was begun with tiny"),
        (("train", "{twin}", "--ste=1"), "unrecognized arguments"),
        (("record", "{new}"), "does not exist"),
        (("record", "{twin}", "--decode=64"), "exceed the twin's context=24"),
        (("record", "{twin}", "--prompt=4", "--decode=8", "--train-tokens=99999"), "ask less"),
        (("record", "{twin}", "--how=beam"), "decode mode 'beam' is unknown"),
        (("record", "{twin}", "--ahead=0"), "ahead=0"),
        (("record", "{twin}", "--how=sample", "--temperature=0"), "temperature=0.0"),
        (("check", "{twin}", "--tokens=0"), "--tokens=0"),
        (("ship", "{new}", "{twin}"), "does not exist"),
        (("ship", "{twin}", "{text}"), "holds 0 recordings *-train.residual.safetensors"),
        (("ship", "{twin}", "{twin}", "--max-mb=0"), "--max-mb=0.0"),
        (("ship", "{twin}", "{twin}", "--max-mb=0.01"), "not one request fits"),
        (("ship", "{twin}", "{twin}", "--pregate=best"), "--pregate=best is unknown"),
    ],
)
def test_wrong_arguments_end_in_one_line_and_two(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    places = {"new": tmp_path / "new", "twin": folder, "text": folder.parent / "text"}
    before = sorted(path.name for path in folder.iterdir())
    code, _, err = run(capsys, *(word.format(**places) for word in words))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "new" / "twin.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow
def test_small_traces_and_help_need_no_torch(folder: Path, tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from traces.twin.cli import main; sys.exit(main(sys.argv[1:]))"

    def call(*words: object) -> Any:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, words)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "COLUMNS": "120"},
        )

    done = call("ship", tmp_path, folder, "--max-mb=1")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "tiny-twin-eval.safetensors").exists()
    assert call("--help").returncode == 0
    done = call("check", folder)
    assert done.returncode == 2
    assert done.stderr == "error: torch is not installed; install it: pip install 'expertflow[record]'\n"
