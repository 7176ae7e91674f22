"""Facts about stopped scripts: a signal saves, and the same command goes on."""
import signal

import pytest
from tiny_runs import distance, grpo, log, opd, stop_at_rollout, tensors


@pytest.mark.parametrize("stage", ["grpo", "opd"])
def test_a_stopped_run_saves_and_goes_on_bit_exactly(here, teachers, monkeypatch, capsys, stage):
    options = dict(iters=4, save_every=1000)
    run, result = opd, "runs/{}/student.pt"
    if stage == "grpo":
        run, result = grpo, "runs/{}/adapter.pt"
        options.update(tasks=["quality"])
    else:
        options.update(teachers=teachers)
    run(**options, name="whole")
    stop_at_rollout(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        run(**options, name="cut")
    assert ended.value.code == 143
    assert "after iteration 2: state saved in runs/cut/state.pt;" in capsys.readouterr().err
    assert [row["iter"] for row in log("cut")] == [1, 2]
    run(**options, name="cut")
    assert [row["iter"] for row in log("cut")] == [1, 2, 3, 4]
    assert distance(tensors(result.format("whole")), tensors(result.format("cut"))) == 0
