"""For each architecture: what is recorded is what its routing, restated in these tests, gives, and nothing changes.

Recorded in padded batches with a cache; compared with each request run alone, at once, without one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.unit.recorder.models import CHOOSERS, MODELS, Floats, at, build, logits_of, moe_layers, norm, router, softmax
from traces.recorder.generate import Answer, Prompt, Sampling, generate, record_batches
from traces.recorder.locate import Located, locate
from traces.recorder.recording import Recording

AHEAD = 2
PROMPTS = [
    Prompt((5, 9, 2, 33, 17, 40), "long"),
    Prompt((7,), "one token"),
    Prompt((1, 60, 8, 12), "in a batch of its own"),
]
SAMPLINGS = {"greedy": Sampling(7), "sampled": Sampling(7, temperature=1.5, seed=3)}
ALL = pytest.mark.parametrize("name", sorted(MODELS))


@dataclass
class Recorded:
    """A model, its taps, and what was recorded of the prompts."""

    model: Any
    located: Located
    answers: list[Answer]


@cache
def recorded(name: str, how: str = "greedy", full: bool = False) -> Recorded:
    model = build(name)
    located = locate(model)

    def make(on_forward: Any) -> Recording:
        return Recording(
            model,
            located.taps,
            num_experts=located.num_experts,
            top_k=located.top_k,
            lookahead=AHEAD,
            full=full,
            logits=True,
            on_forward=on_forward,
        )

    return Recorded(model, located, list(record_batches(model, make, iter(PROMPTS), 2, SAMPLINGS[how])))


def states_of(model: Any, tokens: list[int]) -> tuple[list[Floats], list[Floats]]:
    """Of each MoE layer the residual stream before its MoE block [n,d], and the router's input [n,d]."""
    residuals, inputs = [], []
    handles = []
    for index in moe_layers(model):
        layer = model.model.layers[index]
        for module, kept in ((layer.post_attention_layernorm, residuals), (router(layer), inputs)):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, args, kept=kept: kept.append(args[0].reshape(-1, args[0].shape[-1]).double().numpy())
                )
            )
    with torch.no_grad():
        model(torch.tensor([tokens]), use_cache=False)
    for handle in handles:
        handle.remove()
    return residuals, inputs


def whole(answer: Answer) -> list[int]:
    return [*answer.prompt.tokens, *answer.generated[:-1]]


@pytest.mark.mostly_slow(keep=2)
@ALL
@pytest.mark.parametrize("how", sorted(SAMPLINGS))
def test_recording_changes_no_token(name: str, how: str) -> None:
    answers = recorded(name, how).answers
    alone = build(name)
    without = generate(alone, PROMPTS[:2], SAMPLINGS[how], 0) + generate(alone, PROMPTS[2:], SAMPLINGS[how], 1)
    assert [answer.generated for answer in answers] == without
    assert all(len(answer.generated) == 7 for answer in answers)


@pytest.mark.mostly_slow(keep=6)
@ALL
@pytest.mark.parametrize("how", sorted(SAMPLINGS))
def test_tokens_are_the_prompt_and_what_was_fed_back(name: str, how: str) -> None:
    answers = recorded(name, how).answers
    assert [answer.prompt for answer in answers] == PROMPTS
    for answer in answers:
        assert answer.token_ids.tolist() == whole(answer)
        assert len(answer.rows) == len(answer.prompt.tokens) + 6
        first = 0 if answer.prompt.label != PROMPTS[2].label else 7
        prompt = len(answer.prompt.tokens)
        assert answer.forward_id.tolist() == [first] * prompt + list(range(first + 1, first + 7))


@ALL
@pytest.mark.parametrize("how", sorted(SAMPLINGS))
def test_experts_weights_and_logits_are_those_of_the_architecture(name: str, how: str) -> None:
    found = recorded(name, how)
    layers = moe_layers(found.model)
    assert found.located.moe_layer_ids == layers
    for answer in found.answers:
        _, inputs = states_of(found.model, whole(answer))
        for column, index in enumerate(layers):
            layer = found.model.model.layers[index]
            logits = logits_of(layer, inputs[column])
            ids, weights = CHOOSERS[name](logits, layer, found.model.config)
            order = np.argsort(-weights, axis=1, kind="stable")
            arrays = answer.rows.arrays
            np.testing.assert_array_equal(arrays["experts"][:, column], at(ids, order), f"layer {index}")
            np.testing.assert_allclose(arrays["weights"][:, column], at(weights, order), atol=2e-5, rtol=2e-4)
            np.testing.assert_allclose(arrays["logits"][:, column], logits, atol=5e-3, rtol=2e-3)


def guesses(name: str, model: Any, answer: Answer) -> dict[tuple[str, int, int], tuple[Floats, npt.NDArray[np.int64]]]:
    """(kind, column, distance) → logits and chosen ids of the pre-gate, computed here."""
    layers = moe_layers(model)
    residuals, inputs = states_of(model, whole(answer))
    made = {}
    for column in range(len(layers)):
        for distance in range(1, min(AHEAD, len(layers) - 1 - column) + 1):
            target = model.model.layers[layers[column + distance]]
            for kind, states in (
                ("residual", norm(target, residuals[column], model.config)),
                ("normed", inputs[column]),
            ):
                logits = logits_of(target, states)
                made[kind, column, distance] = logits, CHOOSERS[name](logits, target, model.config)[0]
    return made


@pytest.mark.mostly_slow(keep=3)
@ALL
def test_lookahead_is_the_later_router_on_the_earlier_state(name: str) -> None:
    found, in_full = recorded(name), recorded(name, full=True)
    top_k = found.located.top_k
    for answer, other in zip(found.answers, in_full.answers, strict=True):
        rows = answer.rows
        made = guesses(name, found.model, answer)
        assert made
        for (kind, column, distance), (logits, chosen) in made.items():
            place = (slice(None), column, distance - 1)
            ids = rows.arrays[f"lookahead_ids@{kind}"][place].astype(np.int64)
            assert ids.shape == (len(rows), min(2 * top_k, found.located.num_experts))
            np.testing.assert_array_equal(np.sort(ids[:, :top_k]), np.sort(chosen), f"{kind} {column} {distance}")
            chances = np.minimum(1.0, top_k * -np.sort(-softmax(logits), axis=1))[:, : ids.shape[1]]
            scores = rows.arrays[f"lookahead_scores@{kind}"][place]
            np.testing.assert_allclose(scores / 255, chances, atol=0.5 / 255 + 1e-4)
            actual = rows.arrays["experts"][:, column + distance]
            right = [len({*guess} & {*chose}) for guess, chose in zip(chosen.tolist(), actual.tolist(), strict=True)]
            assert rows.hits[kind][place].tolist() == right
            # In full: all logits, dealt so that the chosen ones lead.
            dense = other.rows.arrays[f"lookahead@{kind}"][place].astype(np.float64)
            np.testing.assert_allclose(np.sort(dense), np.sort(logits), atol=5e-3, rtol=2e-3)
            assert (at(dense, chosen).min(axis=1) >= -np.sort(-dense, axis=1)[:, top_k - 1] - 1e-9).all()
        beyond = rows.arrays["lookahead_ids@residual"][:, -1]
        assert (beyond == 255).all()
        assert np.isnan(other.rows.arrays["lookahead@normed"][:, -1]).all()
        assert not rows.hits["residual"][:, -1].any()


def test_the_models_tell_layers_kinds_and_tokens_apart() -> None:
    """The tests above could not fail if routing were the same everywhere, or both pre-gates one."""
    differing = 0
    for name in MODELS:
        rows = recorded(name).answers[0].rows
        experts = rows.arrays["experts"]
        assert len(np.unique(experts[:, 0], axis=0)) > 1, name
        assert not np.array_equal(experts[:, 0], experts[:, 1]), name
        differing += not np.array_equal(rows.arrays["lookahead_ids@residual"], rows.arrays["lookahead_ids@normed"])
    assert differing == len(MODELS)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_an_answer_ends_at_its_end_token_and_the_batch_goes_on(name: str) -> None:
    model = build(name)
    located = locate(model)
    free = generate(model, PROMPTS[:2], SAMPLINGS["sampled"], 0)
    # A token that ends the one early and does not occur in the other.
    end = next(token for token in free[0][1:4] if token not in free[1] and token != free[0][0])
    never = next(token for token in range(61) if token not in free[0] + free[1])
    model.generation_config.eos_token_id = [end, never]

    def make(on_forward: Any) -> Recording:
        return Recording(
            model, located.taps, num_experts=located.num_experts, top_k=located.top_k, on_forward=on_forward
        )

    first, second = record_batches(model, make, iter(PROMPTS[:2]), 2, SAMPLINGS["sampled"])
    assert first.generated == free[0][: free[0].index(end) + 1]
    assert len(first.generated) < len(second.generated)
    assert len(first.rows) == len(first.prompt.tokens) + len(first.generated) - 1
    assert len(second.rows) == len(second.prompt.tokens) + len(second.generated) - 1


def test_penalties_and_filters_of_the_model_do_not_count() -> None:
    model = build("mixtral")
    plain = [generate(model, PROMPTS[:1], how) for how in SAMPLINGS.values()]
    own = model.generation_config
    own.no_repeat_ngram_size, own.repetition_penalty, own.min_p, own.suppress_tokens = 1, 9.0, 0.9, list(plain[0][0])
    assert [generate(model, PROMPTS[:1], how) for how in SAMPLINGS.values()] == plain
    assert model.generation_config is own


def test_the_random_state_of_the_process_stays() -> None:
    model = build("mixtral")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    generate(model, PROMPTS[:1], SAMPLINGS["sampled"])
    assert torch.equal(torch.rand(3), expected)
