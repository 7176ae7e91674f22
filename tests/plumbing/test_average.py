"""The moving average of the weights (plumbing/average.py)."""
import pytest
import torch
from tiny_runs import distance, make_teacher, opd, stop_at_rollout, tensors

from plumbing.average import Average


def released_average(history, decay, every):
    """flow_grpo/ema.py:33-49. n is the number of steps before; there it is the number after."""
    mean = history[0].clone()
    for n, weights in enumerate(history[1:]):
        one_minus_decay = 1 - min((1 + n) / (10 + n), decay)
        if (n + 1) % every == 0:
            mean += one_minus_decay * (weights - mean)
    return mean


@pytest.mark.parametrize("decay, every", [(0.9, 8), (0.9, 1), (0.5, 3)])
def test_the_average_is_the_released_one(decay, every):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2, bias=False)
    average = Average(net, decay, every)
    history = [net.weight.detach().clone()]
    for _ in range(50):
        net.weight.data += torch.randn(2, 3)
        average.step()
        history.append(net.weight.detach().clone())
    with average.applied():
        torch.testing.assert_close(net.weight.detach(), released_average(history, decay, every))
    assert torch.equal(net.weight.detach(), history[-1]), "the weights are back"
    assert torch.equal(average.state()["weights"]["weight"], average.means[0])


def test_without_a_decay_there_is_no_average():
    net = torch.nn.Linear(3, 2)
    average = Average(net, 0, 8)
    before = net.weight.detach().clone()
    net.weight.data += 1
    average.step()
    with average.applied():
        assert torch.equal(net.weight.detach(), before + 1)
    assert average.state() is None


def test_what_a_run_saves_is_the_average(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher("ocr.pt", "ocr", anchor=True)
    opd(teachers=[teacher], init="none", name="plain", keep=1)
    opd(teachers=[teacher], init="none", name="mean", ema=0.15, ema_every=1)
    start, first, second = (tensors(f"runs/plain/{name}.pt")
                            for name in ("init", "student-1", "student-2"))
    mean = tensors("runs/mean/student.pt")
    for name in mean:
        expected = released_average([start[name], first[name], second[name]], 0.15, 1)
        torch.testing.assert_close(mean[name], expected)
    assert distance(mean, second) > 1e-5


def test_a_stopped_run_goes_on_with_its_average_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = make_teacher("ocr.pt", "ocr", anchor=True)
    options = dict(teachers=[teacher], init="none", iters=4, ema=0.9, ema_every=1, save_every=1)
    opd(**options, name="whole")
    with monkeypatch.context() as patch:
        stop_at_rollout(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            opd(**options, name="stopped")
    opd(**options, name="stopped")
    for file in ("student", "init"):
        assert distance(tensors(f"runs/whole/{file}.pt"), tensors(f"runs/stopped/{file}.pt")) == 0
