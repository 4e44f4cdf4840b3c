"""The mutators themselves: what a step does, that each is drawn, and that leaving one out leaves the others alone."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from tests.attack import formats, raw, tensors, trace_oracle, traces, trees
from tests.attack.formats import Format
from tests.attack.readers import READERS


def built(form: Format, content: bytes, seed: int, left_out: tuple[int, ...] = ()) -> formats.Mutant:
    return formats.build(form, form.parse(content), Random(seed), left_out)


FILES = [(reader.name, reader.make) for reader in READERS if not reader.name.startswith("twin")]


@pytest.mark.mostly_slow(keep=8)
@pytest.mark.parametrize(("name", "make"), FILES, ids=[name for name, _ in FILES])
def test_mutants_of_every_reader_are_made_and_the_same_again(name: str, make: Any, tmp_path: Path) -> None:
    path = make(tmp_path)
    form, content = formats.of(path), path.read_bytes()
    document = form.parse(content)
    first = [formats.build(form, document, Random(seed)) for seed in range(150)]
    # The document is as it was: no mutant has changed the next one's.
    assert first == [formats.build(form, document, Random(seed)) for seed in range(150)]
    assert len({mutant.content for mutant in first}) > 60
    drawn = {step for mutant in first for step in mutant.steps}
    assert drawn >= {operation.__name__ for operation in (*form.changes, *form.lies, *form.raw)} - {"bomb"}


def test_a_sound_document_is_written_as_it_was_read() -> None:
    for doc in traces.bases():
        content = tensors.write(doc)
        assert tensors.write(tensors.parse(content)) == content
    text = '{"a":[1,2.5,null,true,"x"],"b":{"c":{}},"a b":-1e-07}'
    assert trees.write(trees.parse(text)) == text


def test_every_change_of_a_trace_is_drawn_and_the_harmless_ones_leave_it_sound() -> None:
    bases = traces.bases()[:6]
    drawn: Counter[str] = Counter()
    sound: Counter[str] = Counter()
    for seed in range(1_000):
        doc, operation = bases[seed % len(bases)].copy(), traces.OPS[seed % len(traces.OPS)]
        operation(Random(seed), doc)
        drawn[operation.__name__] += 1
        try:
            trace_oracle.check(tensors.write(doc))
            sound[operation.__name__] += 1
        except trace_oracle.Unsound:
            continue
    assert drawn.keys() == {operation.__name__ for operation in traces.OPS}
    for operation in (traces.drop_lists, traces.split_again, tensors.reorder, traces.other_values):
        assert sound[operation.__name__] == drawn[operation.__name__]
    for operation in (traces.wrong_id, traces.wrong_value, traces.wrong_count, traces.wrong_request):
        assert sound[operation.__name__] < 0.8 * drawn[operation.__name__]


def test_a_step_left_out_leaves_the_others_as_they_were() -> None:
    content = tensors.write(traces.bases()[0])
    checked = 0
    for seed in range(400):
        whole = built(formats.TRACE, content, seed)
        if len(whole.steps) < 2:
            continue
        for index, name in enumerate(whole.steps):
            smaller = built(formats.TRACE, content, seed, (index,))
            assert smaller.steps == whole.steps[:index] + whole.steps[index + 1 :], name
        assert built(formats.TRACE, content, seed, tuple(range(len(whole.steps)))).content == content
        checked += 1
    assert checked > 50


def test_a_tree_can_say_what_json_cannot() -> None:
    rng = Random(0)
    texts = [trees.write(trees.mutate(rng, trees.parse('{"a":[1,{"b":"c"}],"d":2.5}'))) for _ in range(3_000)]
    assert any(text.count('"a"') == 2 for text in texts)
    assert any("NaN" in text for text in texts)
    assert max(map(len, texts)) > 20_000
    refused = 0
    for text in texts:
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            refused += 1
    assert 50 < refused < 1_500


@pytest.mark.parametrize("operation", raw.OPS, ids=lambda operation: operation.__name__)
def test_bytes_change_and_none_are_needed(operation: raw.RawOp) -> None:
    content = bytes(range(200))
    assert sum(operation(Random(seed), content) != content for seed in range(50)) > 25
    assert all(isinstance(operation(Random(seed), b""), bytes) for seed in range(20))


def test_archives_lie_about_their_members() -> None:
    target = io.BytesIO()
    np.savez_compressed(target, a=np.zeros((2, 2, 2), np.int32), b=np.ones((1, 2, 2), np.int32))
    found = Counter[str]()
    for seed in range(300):
        mutant = built(formats.NPZ, target.getvalue(), seed)
        try:
            with np.load(io.BytesIO(mutant.content)) as archive:
                _ = [archive[name] for name in archive.files]
            found["read"] += 1
        except Exception as error:
            found[type(error).__name__] += 1
    assert found["read"] > 50
    assert len(found) > 4
