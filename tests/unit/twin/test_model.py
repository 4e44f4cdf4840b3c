"""The network: its routing against a slow restatement, its gradients, its cache, its shapes."""

import numpy as np
import pytest
import torch

from tests.unit.twin.tiny import FORMS, shake, slow_mixture, tiny
from traces.twin.config import TOPOLOGIES, TwinConfig, preset
from traces.twin.model import Twin, balance


def states_of(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_routing_and_experts_are_those_of_a_slow_restatement(form: str, count: int) -> None:
    model = shake(Twin(tiny(form)))
    for _, block in model.moe_blocks:
        states = states_of(count, 16)
        with torch.no_grad():
            _, ids, weights = block.router(states)
            made = block.experts(states, ids, weights)
        slow_ids, slow_weights, slow_made = slow_mixture(block, states.double().numpy())
        assert ids.tolist() == slow_ids
        np.testing.assert_allclose(weights.numpy(), slow_weights, rtol=1e-5)
        np.testing.assert_allclose(made.numpy(), slow_made, rtol=1e-4, atol=1e-5)


def test_experts_are_right_when_all_tokens_choose_the_same() -> None:
    _, block = shake(Twin(tiny())).moe_blocks[0]
    states = states_of(1, 16).expand(50, -1)
    with torch.no_grad():
        _, ids, weights = block.router(states)
        made = block.experts(states, ids, weights)
    assert len(set(map(tuple, ids.tolist()))) == 1
    np.testing.assert_allclose(made.numpy(), slow_mixture(block, states.double().numpy())[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("form", "total"), [("gpt-oss", 1.0), ("deepseek", None)])
def test_gate_weights_sum_to_one_where_they_are_normalised(form: str, total: float | None) -> None:
    _, block = shake(Twin(tiny(form))).moe_blocks[0]
    with torch.no_grad():
        sums = block.router(states_of(9, 16))[2].sum(dim=1)
    assert torch.allclose(sums, torch.ones(9)) is (total is not None)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_the_text_alone_reaches_routers_and_experts(form: str) -> None:
    model = Twin(tiny(form))
    tokens = torch.arange(48).view(2, 24)
    torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


def test_gradients_of_experts_are_those_of_a_loop() -> None:
    _, block = shake(Twin(tiny())).moe_blocks[0]
    states = states_of(20, 16).requires_grad_()
    _, ids, weights = block.router(states)
    looped = torch.zeros(20, 16)
    for row in range(20):
        for column in range(2):
            expert = int(ids[row, column])
            gate, up = (states[row] @ block.experts.gate_up[expert]).chunk(2)
            made = (torch.nn.functional.silu(gate) * up) @ block.experts.down[expert]
            looped = looped.index_add(0, torch.tensor([row]), (weights[row, column] * made)[None])
    wanted = (states, block.router.weight, block.experts.gate_up, block.experts.down)
    expected = torch.autograd.grad(looped.square().sum(), wanted, retain_graph=True)
    found = torch.autograd.grad(block.experts(states, ids, weights).square().sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_token_by_token_is_what_one_forward_is(form: str) -> None:
    model = shake(Twin(tiny(form))).eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        whole = model(tokens)
        cache: list[tuple[torch.Tensor, torch.Tensor]] = []
        parts = [model(tokens[:, :9], cache), *(model(tokens[:, at : at + 1], cache) for at in range(9, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_no_token_sees_a_later_one() -> None:
    model = shake(Twin(tiny())).eval()
    tokens = torch.arange(20)[None]
    changed = tokens.clone()
    changed[0, 12:] = 99
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :12], model(changed)[:, :12])


def test_balance_is_one_where_choices_and_chances_are_even_and_more_where_they_are_not() -> None:
    even = (torch.zeros(8, 8), torch.arange(16).view(8, 2) % 8)
    loss, load = balance([even, even])
    assert (float(loss), load) == (2.0, 1.0)
    logits = torch.zeros(8, 8)
    logits[:, 0] = 20.0
    loss, load = balance([(logits, torch.tensor([[0, 1]] * 8))])
    assert float(loss) == pytest.approx(4.0, rel=1e-4)
    assert load == 4.0


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens are more than the twin's context=24"):
        Twin(tiny())(torch.zeros(1, 25, dtype=torch.long))


SIZES = [(26, 64, 6), (24, 60, 4), (24, 32, 4)]


@pytest.mark.parametrize(("topology", "sizes"), list(zip(TOPOLOGIES, SIZES, strict=True)))
def test_presets_have_the_topology_of_their_originals(topology: str, sizes: tuple[int, int, int]) -> None:
    config = preset(topology, width=32)
    assert (config.num_layers, config.num_experts, config.top_k) == sizes
    with torch.device("meta"):
        assert len(Twin(config).moe_blocks) == sizes[0]
    assert TwinConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 8}, "top_k=8 must be below num_experts=8"),
        ({"width": 18}, "width=18 must be a multiple of twice num_heads=2"),
        ({"num_layers": 10**9}, "num_layers=1000000000 must be a whole number in 1 … 256"),
        ({"num_layers": True}, "num_layers=True"),
        ({"num_layers": "3"}, "num_layers='3'"),
        ({"routed_scale": float("nan")}, "routed_scale=nan"),
        ({"normalised": 1}, "normalised=1 must be true or false"),
        ({"name": "a\nb"}, "printable"),
        ({"num_dense_layers": 1}, "dense_width"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    values = tiny().to_json() | changes
    with pytest.raises(ValueError, match=message):
        TwinConfig.from_json(values)
