"""The norms of both gradients, and the weight that keeps the penalty to a share of the task's."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.loss import BinaryCrossEntropy
from timm.task import ClassificationTask
from torch import nn

from tests.models import BUILDERS, batch, tiny_task
from tweo_timm import Fp8Recipe, Tweo, TweoConfig, attach_tweo, patch_fp8
from tweo_timm.balance import INTERVAL, Balance, Norms, gradient_norms
from tweo_timm.fp8.patch import fp8_state, held_fp8

CPU = torch.device("cpu")
AUTO = TweoConfig(balance=0.1)


def norms(task, penalty):
    return Norms(torch.tensor(float(task)), torch.tensor(float(penalty)))


def reference_norm(loss, parameters):
    """In float64, by `backward`."""
    loss.backward(retain_graph=True)
    total = sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None) ** 0.5
    for parameter in parameters:
        parameter.grad = None
    return total


def terms(task, handle):
    """The task's loss and L_TWEO of one pass, with their graph."""
    found = {}
    original = handle._found_weight
    handle._found_weight = lambda task_loss, tweo: found.update(task=task_loss, tweo=tweo) or original(task_loss, tweo)
    found["result"] = task(*batch())
    return found


@pytest.mark.parametrize("family", ["vit", "swin"])
def test_norms_are_those_of_two_backward_passes_and_leave_nothing_behind(family):
    task = tiny_task(BUILDERS[family]())
    handle = attach_tweo(task, TweoConfig(tau=0.5))
    found = terms(task, handle)
    parameters = list(task.parameters())
    state = torch.random.get_rng_state()
    got = gradient_norms(found["task"], found["tweo"], parameters)
    assert all(parameter.grad is None for parameter in parameters)
    assert torch.equal(torch.random.get_rng_state(), state)
    for value, loss in zip(got, (found["task"], found["tweo"]), strict=True):
        assert float(value) == pytest.approx(reference_norm(loss, parameters), rel=1e-5)


def test_norms_of_elements_whose_squares_are_no_float32_are_right():
    parameter = nn.Parameter(torch.ones(2))
    task, penalty = (parameter * torch.tensor([3e30, 4e30])).sum(), (parameter * torch.tensor([3e-30, 4e-30])).sum()
    got = gradient_norms(task, penalty, [parameter, nn.Parameter(torch.ones(1))])
    assert [float(value) for value in got] == pytest.approx([5e30, 5e-30], rel=1e-6)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # clocks: a busy machine is no fault
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e20)), min_size=1, max_size=6))
def test_the_weight_is_never_more_than_asked_for_nor_than_the_share(measured):
    balance, task, penalty = Balance(0.1), None, None
    for one, other in measured:
        balance.note(norms(one, other))
        task = one if task is None else (task + one) / 2
        penalty = other if penalty is None else (penalty + other) / 2
        weight = float(balance.weight(0.01))
        assert weight == pytest.approx(min(0.01, 0.1 * task / penalty if penalty else 0.01), rel=1e-3)


def test_it_measures_the_first_pass_and_one_in_five_and_goes_on_exactly():
    balance = Balance(0.1)
    assert balance.state() == {}
    due = [balance.due() for _ in range(2 * INTERVAL + 1)]
    assert [index for index, is_due in enumerate(due) if is_due] == [0, INTERVAL, 2 * INTERVAL]
    balance.note(norms(1, 1e6))
    balance.note(norms(2, 3e3))
    other = Balance(0.1)
    other.load_state(copy.deepcopy(balance.state()), CPU)
    assert torch.equal(other.weight(0.01), balance.weight(0.01))
    assert [other.due() for _ in range(INTERVAL)] == [balance.due() for _ in range(INTERVAL)]


@pytest.mark.parametrize("odd", [norms("nan", 1e6), norms(1, "inf"), norms("nan", "nan")])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_that_is_not_finite_and_is_skipped_leaves_no_trace(odd, place):
    measured = [norms(1, 1e6), norms(2, 3e3)]
    plain, disturbed = Balance(0.1), Balance(0.1)
    for one in measured:
        plain.note(one)
    for one in [*measured[:place], odd, *measured[place:]]:
        disturbed.note(one)
    assert torch.equal(disturbed.weight(0.01), plain.weight(0.01))


@pytest.mark.parametrize(
    "state",
    [
        {"means": torch.tensor([1.0, float("nan")]), "passes": 1},
        {"means": torch.tensor([1.0, -1.0]), "passes": 1},
        {"means": torch.ones(3), "passes": 1},
        {"means": torch.ones(2), "passes": 0},
    ],
)
def test_a_state_that_no_balance_writes_is_refused(state):
    with pytest.raises(ValueError, match="means of gradients"):
        Balance(0.1).load_state(state, CPU)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), BinaryCrossEntropy(smoothing=0.0)], ids=["ce", "bce"])
def test_under_either_loss_the_penalty_pulls_at_most_a_tenth_as_hard_as_the_task(loss):
    task = ClassificationTask(BUILDERS["vit"](), loss, verbose=False)
    task.trainable_module.train()
    task.trainable_module.pos_embed.data *= 1e4  # L_TWEO as of a model that was trained without it
    handle = attach_tweo(task, AUTO)
    found = terms(task, handle)
    result, parameters = found["result"], list(task.parameters())
    pulls = [reference_norm(term, parameters) for term in (found["task"], result["tweo_weight"] * found["tweo"])]
    assert float(result["tweo_weight"]) < 0.01
    assert pulls[1] / pulls[0] == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(result["loss"], result["task_loss"] + result["tweo_weight"] * result["tweo_loss"])


def test_a_smaller_gradient_of_the_task_means_a_smaller_weight():
    """The same model and images: a mean of binary cross-entropies pulls less than cross-entropy does."""
    weights = []
    for loss in (nn.CrossEntropyLoss(), BinaryCrossEntropy(smoothing=0.0)):
        torch.manual_seed(0)
        task = ClassificationTask(BUILDERS["vit"](), loss, verbose=False)
        task.trainable_module.train()
        task.trainable_module.pos_embed.data *= 1e4
        attach_tweo(task, AUTO)
        weights.append(float(task(*batch())["tweo_weight"]))
    assert weights[1] < weights[0]


def test_from_scratch_the_weight_is_the_papers():
    task = tiny_task(BUILDERS["vit"]())
    attach_tweo(task, AUTO)
    assert float(task(*batch())["tweo_weight"]) == pytest.approx(0.01)


def test_the_ratio_is_measured_where_it_was_asked_for_and_only_while_the_penalty_acts():
    task = tiny_task(BUILDERS["vit"]())
    handle = attach_tweo(task, TweoConfig(weight=0.01, schedule="linear", end_weight=0.0))
    handle.set_progress(0.0)
    task(*batch())
    assert handle.grad_ratio is None
    handle.measure_gradients()
    found = terms(task, handle)
    pulls = [reference_norm(term, list(task.parameters())) for term in (found["task"], 0.01 * found["tweo"])]
    assert float(handle.grad_ratio) == pytest.approx(pulls[1] / pulls[0], rel=1e-4)
    handle.set_progress(1.0)
    handle.measure_gradients()
    task(*batch())
    assert handle.grad_ratio is None


def test_fp8_scales_are_held_while_gradients_are_measured():
    torch.manual_seed(0)
    model = BUILDERS["vit"]()
    patch_fp8(model, Fp8Recipe(backend="emulated"))
    loss = nn.functional.cross_entropy(model.train()(batch()[0]), batch()[1])
    before = fp8_state(model)
    with held_fp8(model):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        moved = fp8_state(model)
    after = fp8_state(model)
    assert any(not torch.equal(moved[key], before[key]) for key in before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_penalty_that_does_not_know_the_task_is_refused():
    with pytest.raises(ValueError, match="attach_tweo"):
        Tweo(BUILDERS["vit"](), AUTO)
