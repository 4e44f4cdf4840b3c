"""The hooks on models that are no Hugging Face ones: explicit taps, every way to say what was chosen, every refusal."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from traces.format import open_trace
from traces.recorder.locate import locate
from traces.recorder.lookahead import Recall, dense, listed, num_right
from traces.recorder.recording import Recording, Rows, Tap
from traces.stream import TraceWriter

D, E, K, LAYERS = 6, 5, 2, 3


class Scale(nn.Module):
    """A norm that works on its input in place, and leaves it as it found it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D) + 0.5)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        scale = states.norm(dim=-1, keepdim=True) + 1e-3
        states /= scale
        result = states * self.weight
        states *= scale
        return result


class Block(nn.Module):
    """A layer of one MoE block with a list of experts; `biased` ones are chosen by more than their logits."""

    def __init__(self, biased: bool) -> None:
        super().__init__()
        self.norm = Scale()
        self.router = nn.Linear(D, E)
        self.experts = nn.ModuleList(nn.Linear(D, D) for _ in range(E))
        self.bias = torch.arange(E) * 0.2 if biased else torch.zeros(E)

    def choose(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ids = (logits + self.bias).topk(K, dim=-1).indices
        return ids, logits.gather(-1, ids).sigmoid()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = self.norm(states).reshape(-1, D)
        ids, weights = self.choose(self.router(flat))
        out = torch.zeros_like(flat)
        for expert, module in enumerate(self.experts):
            rows, ranks = (ids == expert).nonzero(as_tuple=True)
            if len(rows):
                out[rows] += module(flat[rows]) * weights[rows, ranks, None]
        # In place: what was recorded before must not change with it.
        states += out.reshape(states.shape)
        return states


class Toy(nn.Module):
    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, D)
        self.layers = nn.ModuleList(Block(biased) for _ in range(LAYERS))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        return states


IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def toy(biased: bool = False) -> Toy:
    torch.manual_seed(0)
    return Toy(biased).eval()


def taps(model: Toy, choose: bool = False, **changes: Any) -> list[Tap]:
    made = []
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Block)
        facts = {"norm": layer.norm, "experts": layer.experts, "choose": layer.choose if choose else None}
        made.append(Tap(index, layer.router, **facts | changes))
    return made


def record(model: nn.Module, given: list[Tap], **options: Any) -> tuple[Rows, torch.Tensor]:
    with Recording(model, given, num_experts=E, top_k=K, **options) as recording, torch.no_grad():
        output = model(IDS)
        return recording.take(), output


def states(model: Toy) -> list[torch.Tensor]:
    """The residual stream before each layer [n, D]."""
    with torch.no_grad():
        residual, seen = model.embed(IDS), []
        for layer in model.layers:
            seen.append(residual.reshape(-1, D).clone())
            residual = layer(residual)
    return seen


@pytest.mark.parametrize("biased", [False, True])
def test_choices_of_a_model_of_ones_own(biased: bool) -> None:
    model = toy(biased)
    with torch.no_grad():
        before = model(IDS)
    rows, output = record(model, taps(model, choose=True), lookahead=1, logits=True, num_listed=K)
    assert torch.equal(output, before)
    for column, residual in enumerate(states(model)):
        layer = model.layers[column]
        assert isinstance(layer, Block)
        with torch.no_grad():
            logits = layer.router(layer.norm(residual))
            ids, weights = layer.choose(logits)
        order = weights.argsort(dim=1, descending=True)
        assert rows.arrays["experts"][:, column].tolist() == ids.gather(1, order).tolist()
        np.testing.assert_allclose(rows.arrays["weights"][:, column], weights.gather(1, order), rtol=1e-5)
        np.testing.assert_allclose(rows.arrays["logits"][:, column], logits, atol=2e-3)
        if column + 1 < LAYERS:
            later = model.layers[column + 1]
            assert isinstance(later, Block)
            with torch.no_grad():
                for kind, normed in (("residual", later.norm(residual)), ("normed", layer.norm(residual))):
                    guess = later.choose(later.router(normed))[0]
                    found = rows.arrays[f"lookahead_ids@{kind}"][:, column, 0]
                    assert np.sort(found).tolist() == guess.sort(dim=1).values.tolist()


def test_without_choose_the_choice_is_the_top_of_the_logits_and_weights_are_unknown() -> None:
    model = toy()
    rows, _ = record(model, taps(model))
    known, _ = record(model, taps(model, choose=True))
    assert sorted(rows.arrays) == ["experts"]
    np.testing.assert_array_equal(np.sort(rows.arrays["experts"]), np.sort(known.arrays["experts"]))


def test_experts_that_ran_something_else_are_noticed() -> None:
    model = toy(biased=True)
    with pytest.raises(ValueError, match=r"layer 0: expert \d ran \d+ tokens, the record says \d+; give its Tap a"):
        record(model, taps(model))


class Stacked(nn.Module):
    """Experts that are called with the whole choice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D, D))

    def forward(self, states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        scattered = torch.zeros(len(states), E).scatter(1, ids.clamp(max=E - 1), weights)
        return torch.einsum("nd,edf,ne->nf", states, self.weight, scattered)


class Deciding(nn.Module):
    """A router that returns what the test asks for."""

    def __init__(self, give: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, D))
        self.give = give

    def forward(self, states: torch.Tensor, *_: Any, scale: float = 1.0) -> Any:
        return self.give(states @ self.weight.T * scale)


class Bare(nn.Module):
    """One layer whose MoE block carries out another choice than its router returned if `cheat`."""

    def __init__(self, give: Callable[[torch.Tensor], Any], cheat: bool = False, order: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts, self.cheat, self.order = Deciding(give), Stacked(), cheat, order

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        states = torch.randn(input_ids.numel(), D)
        self.router(states, "extra", scale=2.0)
        self.logits = 2.0 * states @ self.router.weight.T
        weights, ids = self.logits.softmax(dim=1).topk(K, dim=1)
        ids = (ids + 1) % E if self.cheat else ids
        if self.order:
            ids, weights = ids.flip(1), weights.flip(1)
        return self.experts(states, ids, weights)


def top(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = logits.softmax(dim=1).topk(K, dim=1)
    return ids, weights


GIVEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "logits": lambda logits: logits,
    "logits, weights, ids": lambda logits: (logits, top(logits)[1], top(logits)[0]),
    "ids and weights alone": top,
    "ids in int32": lambda logits: {"ids": top(logits)[0].int(), "weights": top(logits)[1]},
    "weights among zeros": lambda logits: torch.zeros_like(logits).scatter(1, *top(logits)),
    "weights among zeros, ids": lambda logits: (torch.zeros_like(logits).scatter(1, *top(logits)), top(logits)[0]),
}


@pytest.mark.parametrize("give", sorted(GIVEN))
@pytest.mark.parametrize("with_experts", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_every_way_to_say_what_was_chosen(give: str, with_experts: bool, order: bool) -> None:
    model = Bare(GIVEN[give], order=order).eval()
    tap = Tap(4, model.router, experts=model.experts if with_experts else None)
    rows, _ = record(model, [tap], logits=True)
    ids, weights = top(model.logits)
    assert rows.arrays["experts"][:, 0].tolist() == ids.tolist()
    if with_experts or give != "logits":
        np.testing.assert_allclose(rows.arrays["weights"][:, 0], weights.detach(), rtol=1e-5)
    scale = 1.0 if "logits" in give else 0.5
    if not give.startswith("ids") and "zeros" not in give:
        np.testing.assert_allclose(rows.arrays["logits"][:, 0], scale * model.logits.detach(), atol=4e-3)


def test_experts_that_were_given_other_ids_than_the_router_returned_are_noticed() -> None:
    model = Bare(GIVEN["ids and weights alone"], cheat=True).eval()
    with pytest.raises(ValueError, match="layer 0: its experts were given other ids than its router returned"):
        record(model, [Tap(0, model.router, experts=model.experts)])
    model = Bare(GIVEN["logits"], cheat=True).eval()
    rows, _ = record(model, [Tap(0, model.router, experts=model.experts)])
    assert rows.arrays["experts"][:, 0].tolist() == ((top(model.logits)[0] + 1) % E).tolist()


def test_an_id_past_the_end_is_padding() -> None:
    class Masked(Bare):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            states = torch.randn(input_ids.numel(), D)
            ids = top(self.router(states))[0]
            ids[:, 0] = E
            return self.experts(states, ids, torch.ones(ids.shape))

    model = Masked(GIVEN["logits"]).eval()
    rows, _ = record(model, [Tap(0, model.router, experts=model.experts)])
    assert (rows.arrays["experts"][:, 0, 1] == -1).all()
    assert (rows.arrays["experts"][:, 0, 0] >= 0).all()
    assert rows.arrays["weights"][0, 0].tolist() == [1, 0]


class InBlock(nn.Module):
    """A layer whose router is a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.block = Scale(), _Inner()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = states + self.block(self.norm(states).reshape(-1, D)).reshape(states.shape)
        return result


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Parameter(torch.randn(E, D)), Stacked()

    def forward(self, flat: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.experts(flat, *top(flat @ self.gate.T))
        return result


class BareToy(Toy):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(InBlock() for _ in range(LAYERS))


class Chain(nn.Module):
    """Routers one after the other on states that are drawn; each is called with more than its states."""

    def __init__(self, give: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.routers = nn.ModuleList(Deciding(give) for _ in range(2))
        self.states = torch.randn(2, IDS.numel(), D)

    def forward(self, input_ids: torch.Tensor) -> None:
        for module, drawn in zip(self.routers, self.states, strict=True):
            module(drawn, "extra", scale=2.0)


def test_lookahead_calls_a_router_with_all_that_it_is_called_with() -> None:
    model = Chain(GIVEN["logits"]).eval()
    rows, _ = record(model, [Tap(index, module) for index, module in enumerate(model.routers)], lookahead=1, full=True)
    assert sorted(rows.hits) == ["normed"]
    later = model.routers[1]
    assert isinstance(later, Deciding)
    expected = (2.0 * model.states[0] @ later.weight.T).detach()
    np.testing.assert_allclose(rows.arrays["lookahead@normed"][:, 0, 0], expected, atol=4e-3, rtol=1e-3)


def test_a_guess_may_name_fewer_experts() -> None:
    def one(logits: torch.Tensor) -> Any:
        ids, weights = top(logits)
        return logits, weights, torch.stack([torch.full_like(ids[:, 0], -1), ids[:, 1]], dim=1)

    model = Chain(one).eval()
    rows, _ = record(model, [Tap(index, module) for index, module in enumerate(model.routers)], lookahead=1)
    later = model.routers[1]
    assert isinstance(later, Deciding)
    second = top(2.0 * model.states[0] @ later.weight.T)[0][:, 1]
    assert rows.arrays["lookahead_ids@normed"][:, 0, 0, 0].tolist() == second.tolist()
    actual = rows.arrays["experts"][:, 1, 0]
    assert rows.hits["normed"][:, 0, 0].tolist() == (actual == second.numpy()).astype(int).tolist()


def test_with_all_experts_chosen_logits_are_not_taken_for_weights() -> None:
    def all_of_them(logits: torch.Tensor) -> Any:
        weights, ids = logits.softmax(dim=1).topk(E, dim=1)
        return logits, weights, ids

    model = Chain(all_of_them).eval()
    with Recording(model, [Tap(0, model.routers[0])], num_experts=E, top_k=E, logits=True) as recording:
        model(IDS)
        rows = recording.take()
    np.testing.assert_allclose(rows.arrays["weights"].sum(axis=2), 1, rtol=1e-5)
    assert (np.diff(rows.arrays["weights"]) <= 0).all()
    assert rows.arrays["logits"].min() < 0


class Nested(Block):
    """Its router decides around a linear module, inside a module that passes the decision on; it has no norm."""

    def __init__(self) -> None:
        super().__init__(biased=True)
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.router = Outer()  # type: ignore[assignment]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        flat = self.norm(states).reshape(-1, D)
        ids, weights = self.router(flat)
        out = sum(module(flat) * (weights * (ids == e)).sum(dim=1)[:, None] for e, module in enumerate(self.experts))
        result: torch.Tensor = states + torch.as_tensor(out).reshape(states.shape)
        return result


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, E)

    def forward(self, states: torch.Tensor) -> Any:
        return top(self.linear(states))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, states: torch.Tensor) -> Any:
        return self.inner(states)


def test_of_nested_routers_the_innermost_that_decides_is_taken() -> None:
    model = toy()
    model.layers = nn.ModuleList(Nested() for _ in range(LAYERS))
    found = locate(model.eval(), CONFIG)
    assert [type(tap.router) for tap in found.taps] == [Inner] * LAYERS
    # What passes the states on as they are is no norm.
    assert [tap.norm for tap in found.taps] == [None] * LAYERS


CONFIG = SimpleNamespace(num_experts=E, num_experts_per_tok=K, num_hidden_layers=LAYERS)


def test_a_router_that_is_a_bare_parameter_is_found_and_recorded() -> None:
    torch.manual_seed(0)
    model = BareToy().eval()
    found = locate(model, CONFIG)
    assert [tap.weight is not None for tap in found.taps] == [True] * LAYERS
    rows, _ = record(model, list(found.taps), lookahead=1)
    seen = states(model)
    for column, layer in enumerate(model.layers):
        assert isinstance(layer, InBlock)
        with torch.no_grad():
            actual = top(layer.norm(seen[column]) @ layer.block.gate.T)[0]
            assert rows.arrays["experts"][:, column].tolist() == actual.tolist()
            if column:
                guess = top(layer.norm(seen[column - 1]) @ layer.block.gate.T)[0]
                got = rows.arrays["lookahead_ids@residual"][:, column - 1, 0, :K]
                assert np.sort(got).tolist() == guess.sort(dim=1).values.tolist()


def test_a_list_of_experts_beside_a_linear_router_is_found() -> None:
    model = toy()
    found = locate(model, CONFIG)
    assert [tap.router for tap in found.taps] == [layer.router for layer in model.layers]  # type: ignore[union-attr]
    assert [tap.norm for tap in found.taps] == [layer.norm for layer in model.layers]  # type: ignore[union-attr]
    assert [tap.experts for tap in found.taps] == [layer.experts for layer in model.layers]  # type: ignore[union-attr]
    assert (found.num_experts, found.top_k, found.moe_layer_ids) == (E, K, [0, 1, 2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "names no number of experts .looked for num_local_experts"),
        ({"num_experts_per_tok": "2"}, "names no number of experts per token"),
        ({"num_experts_per_tok": 9}, "top_k=9 of num_experts=5"),
        ({"num_hidden_layers": 7}, "Toy has no list of 7 layers"),
        ({"num_experts": 4}, "no router with 4 experts was found in 3 layers of Toy"),
    ],
)
def test_what_cannot_be_located_is_said(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        locate(toy(), SimpleNamespace(**vars(CONFIG) | changes))


def test_a_nested_configuration_and_a_list_of_equal_numbers_are_read() -> None:
    nested = SimpleNamespace(moe_num_experts=E, moe_top_k=[K, K], to_dict=None)
    assert locate(toy(), SimpleNamespace(ffn=nested, n_layers=LAYERS)).top_k == K


def test_a_router_that_draws_noise_is_refused() -> None:
    model = toy()
    for layer in model.layers:
        assert isinstance(layer, Block)
        layer.router.register_forward_hook(lambda *_: None)
        linear = layer.router.forward
        layer.router.forward = lambda x, linear=linear: linear(x) + torch.rand(E)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="its router router does not give the same answer twice"):
        locate(model, CONFIG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 6}, "top_k=6 must lie in 1 … num_experts=5"),
        ({"lookahead": 3}, "lookahead=3 must lie in 0 … 2: the model has 3 MoE layers"),
        ({"num_listed": 6}, "lookahead_top=6 must lie in 1 … num_experts=5"),
        ({"taps": []}, "taps must name at least one layer, in rising order"),
    ],
)
def test_bad_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    model = toy()
    options = {"taps": taps(model), "num_experts": E, "top_k": K} | changes
    with pytest.raises(ValueError, match=message):
        Recording(model, options.pop("taps"), **options)
    with pytest.raises(ValueError, match="in rising order"):
        Recording(model, taps(model)[::-1], num_experts=E, top_k=K)


def test_misuse_is_said_and_hooks_are_gone_afterwards() -> None:
    model = toy()
    recording = Recording(model, taps(model), num_experts=E, top_k=K)
    with recording:
        with pytest.raises(ValueError, match="running already"):
            recording.__enter__()
        with pytest.raises(ValueError, match="no forward has ended"):
            recording.take()
        model(IDS)
        with pytest.raises(ValueError, match="the rows of the forward before were not taken"):
            model(IDS)
        recording.take()
    model(IDS)
    with pytest.raises(ValueError, match="no forward has ended"):
        recording.take()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="training mode"):
        Recording(model.train(), taps(model), num_experts=E, top_k=K).__enter__()


def test_a_router_that_is_called_twice_or_never_is_noticed() -> None:
    model = toy()
    shared = [Tap(0, model.layers[0].router), Tap(1, nn.Linear(D, E))]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layer 1: its router was not called"):
        record(model, shared)
    model.layers[1].router = model.layers[0].router
    with pytest.raises(ValueError, match="layer 0: its router was called twice in one forward"):
        record(model, shared[:1])


def test_rows_of_a_toy_become_a_trace(tmp_path: Any) -> None:
    model = toy()
    rows, _ = record(model, taps(model, choose=True), lookahead=2)
    recall = Recall(LAYERS, 2)
    recall.add(rows.hits, rows.arrays["experts"])
    with TraceWriter(tmp_path / "t", model="toy", num_experts=E, source="s", license="l") as writer:
        writer.variant = recall.best()
        for request in range(2):
            writer.append(prompt_len=4, **rows.select(slice(4 * request, 4 * request + 4)).arrays)
    trace = open_trace(writer.path)
    np.testing.assert_array_equal(trace.experts[:], rows.arrays["experts"])
    assert trace.lookahead_ids is not None
    np.testing.assert_array_equal(trace.lookahead_ids[:], rows.arrays[f"lookahead_ids@{recall.best()}"])


# -- the pre-gate's arithmetic -------------------------------------------------------------------------------


def test_what_the_router_chose_leads_whatever_its_logits() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    ids, scores = listed(logits, torch.tensor([[3, 2]]), 2, 3)
    assert ids.tolist() == [[2, 3, 0]]
    weights = np.exp([3.0, 2.0, 1.0])
    expected = np.minimum(1, 2 * weights / (weights.sum() + 1))
    assert scores.tolist() == [np.round(255 * expected).astype(int).tolist()]
    assert dense(logits, torch.tensor([[3, 2]])).tolist() == [[1.0, 0.0, 3.0, 2.0]]
    assert dense(logits, torch.tensor([[2, 0]])).tolist() == logits.tolist()


def test_recall_by_distance_and_the_better_kind() -> None:
    experts = np.array([[[0, 1], [2, 3], [4, -1]]], np.int32)
    recall = Recall(3, 2)
    # From layer 0: of layer 1 one of two right, of layer 2 none of one; from layer 1: of layer 2 one of one.
    recall.add(
        {"residual": np.array([[[1, 0], [1, 0], [0, 0]]], np.uint8), "normed": np.zeros((1, 3, 2), np.uint8)}, experts
    )
    assert recall.by_distance() == {"residual": [pytest.approx(2 / 3), 0.0], "normed": [0.0, 0.0]}
    assert recall.best() == "residual"
    recall.add(
        {"residual": np.zeros((1, 3, 2), np.uint8), "normed": np.array([[[2, 1], [1, 0], [0, 0]]], np.uint8)}, experts
    )
    assert recall.by_distance()["normed"] == [0.5, 0.5]
    assert recall.best() == "normed"
    assert num_right(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[2, 1], [-1, 4]])).tolist() == [2, 1]
    assert num_right(torch.tensor([[-1, 2]]), torch.tensor([[2, -1]])).tolist() == [1]
