"""Facts about the two training scripts and the evaluation, on the shipped base with a few images."""
import ast
import dataclasses
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import adapters
import eval as evaluation
import model as models
import tiny
import train_grpo
import train_opd
import util
from sampler import draw_noise, encode, rollout, schedule, velocity

ROOT = Path(__file__).parent.parent
BASE = str(ROOT / "ckpt/tiny.safetensors")
GRPO = dict(model=BASE, iters=2, batch=8, group=4, steps=4, noisy=[0, 3], lora_r=4, lora_alpha=8.0, device="cpu")
OPD = dict(model=BASE, iters=2, batch=8, group=2, steps=4, noisy=[0, 4], updates=1, device="cpu")


def make_teacher(path, task, seed=0, anchor=False, **other):
    """A teacher with random factors (both A and B), so that it differs from the base."""
    model = models.load(BASE)
    torch.manual_seed(seed)
    model.mmdit.add_adapter("t", 4, 8.0)
    tensors = {k: 0.05 * torch.randn_like(v) for k, v in model.mmdit.adapter("t").items()}
    adapters.save_adapter(path, **{**dict(task=task, anchor=anchor, base=model.fingerprint, r=4, alpha=8.0, tensors=tensors, settings={}), **other})
    return str(path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Runs write to the current folder: a fresh one a test."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ckpt").mkdir()
    return tmp_path


@pytest.fixture
def teachers(here):
    return [make_teacher(here / f"ckpt/{task}.pt", task, seed, anchor=task == "quality") for seed, task in enumerate(tiny.TASKS)]


def log(name):
    return [json.loads(line) for line in Path(f"runs/{name}/log.jsonl").read_text().splitlines()]


def tensors(path):
    """Of an adapter; of a whole transformer what it differs in from the base (in the file's float16)."""
    if path.endswith(".pt"):
        return util.read_pt(path, ["tensors"])["tensors"]
    base, whole = load_file(BASE), load_file(path)
    return {k: whole[k].float() - base[k].float() for k in base if "diffusion_model" in k}


def torchrun(ranks, script, *args, **env):
    cmd = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--rdzv_backend=c10d",
           "--rdzv_endpoint=localhost:0", str(ROOT / script), *args]
    return subprocess.run(cmd, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


# ------------------------------------------------------------------ GRPO


def test_advantages_sum_to_zero_in_each_group_and_equal_groups_are_dropped():
    reward = torch.tensor([0.0, 1.0, 0.5, 0.7, 0.7, 0.7])
    adv, keep = train_grpo.advantages(reward, 3, "batch", reward)
    assert adv.view(-1, 3).sum(1).abs().max() < 1e-6 and adv[1] > 0 > adv[0]
    assert keep.tolist() == [True] * 3 + [False] * 3
    assert adv[1] == pytest.approx(0.5 / reward.std(unbiased=False).item(), rel=1e-4)
    own, _ = train_grpo.advantages(reward, 3, "group", reward)
    assert own[1] == pytest.approx(0.5 / reward[:3].std(unbiased=False).item(), rel=1e-4)


def test_ppo_gradient_is_zero_where_the_ratio_is_clipped_and_minus_advantage_elsewhere():
    logp = torch.tensor([0.0, 0.3, -0.3, 0.3, -0.3], requires_grad=True)
    adv = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    loss, ratio = train_grpo.ppo_loss(logp, torch.zeros(5), adv, 0.2)
    loss.sum().backward()
    expected = [-1.0, 0.0, -ratio[2].item(), ratio[3].item(), 0.0]       # only moves that the objective no longer rewards are cut
    assert logp.grad.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_ratio_is_one_before_the_first_update(here, kind):
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1}, tasks=["ocr"], micro=3, rollout=kind, name="r"))
    assert log("r")[0]["ratio_err"] < 1e-5


def test_grpo_update_makes_better_than_average_images_more_likely(here):
    """One small step raises the log-probability of the actions with a positive advantage against those with a negative one."""
    model = models.load(BASE)
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1, "batch": 16, "group": 8, "lr": 1e-3}, tasks=["quality"], beta=0.0, name="u", out="u.pt"))
    net = model.mmdit
    net.add_adapter("policy", 4, 8.0, tensors("u.pt"))
    rng = tiny.np.random.default_rng((0, 0))
    metas = [tiny.draw_prompt(rng, "quality", "train") for _ in range(2) for _ in range(1)]
    metas = [m for m in metas for _ in range(8)]
    times, text = schedule(4), encode(model.text, [m["prompt"] for m in metas])
    noise = draw_noise([(0, 0, i) for i in range(16)], 4, model.latent_shape())
    traj = rollout(net, noise, times, text, kind="sde", noisy=range(3))
    reward = torch.from_numpy(tiny.quality(model.images(traj.x[:, -1])))
    adv, _ = train_grpo.advantages(reward, 8, "batch", reward)
    change = torch.zeros(16)
    with torch.no_grad():
        for k in range(3):
            v = velocity(net, traj.x[:, k], times[k].expand(16), text, adapter="policy")
            mean, std = train_grpo.step("sde", traj.x[:, k], v, times[k], times[k + 1], 0.7, times[1])
            change += train_grpo.log_prob(traj.x[:, k + 1], mean, std) - traj.logp[:, k]
    assert (adv * change).mean() > 0


def test_grpo_writes_a_teacher_of_plain_tensors(here):
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1}, tasks=["quality"], anchor=True))
    teacher = torch.load("ckpt/quality.pt", weights_only=True)
    assert teacher["task"] == "quality" and teacher["anchor"] and teacher["reward"] == {"quality": {"quality": 1.0}}
    assert teacher["base"] == models.load(BASE).fingerprint and teacher["settings"]["lr"] == 5e-4


def test_grpo_mix_draws_prompts_in_the_ratio(here):
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1, "batch": 20, "group": 2}, tasks=["geneval", "ocr", "quality"], ratio=[3, 1, 1], name="mix"))
    assert {"reward_geneval", "reward_ocr", "reward_quality"} <= set(log("mix")[0])
    assert Path("runs/mix/adapter.pt").exists() and not list(Path("ckpt").glob("*.pt")), "a mix is no teacher"


# ------------------------------------------------------------------ OPD


def two_adapters(same):
    model = models.load(BASE)
    torch.manual_seed(0)
    net = model.mmdit
    net.add_adapter("seed", 4, 8.0)
    random = {k: 0.05 * torch.randn_like(v) for k, v in net.adapter("seed").items()}
    net.add_adapter("teacher", 4, 8.0, random)
    net.add_adapter("student", 4, 8.0, random if same else {k: 0.05 * torch.randn_like(v) for k, v in random.items()}, trainable=True)
    return model, net


def opd_gradient(model, net, kind="sde"):
    text = encode(model.text, ["a photo of a red circle", 'a sign that says "HAT"'])
    times = schedule(4)
    traj = rollout(net, draw_noise([(i,) for i in range(2)], 4, model.latent_shape()), times, text, adapter="student", kind=kind)
    loss = 0
    for k in range(3):
        s = train_opd.State(traj.x[:, k], traj.x[:, k + 1], times[k].expand(2), times[k + 1].expand(2), times[1], kind, 0.7, traj.logp[:, k], None)
        v = velocity(net, s.x, s.t, text, adapter="student")
        with torch.no_grad():
            target = velocity(net, s.x, s.t, text, adapter="teacher")
        loss = loss + train_opd.kl(v, target, s).sum()
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_student_equal_to_teacher_has_zero_opd_gradient(kind):
    loss, grad = opd_gradient(*two_adapters(same=True), kind)
    assert loss == 0 and grad.abs().max() == 0
    loss, grad = opd_gradient(*two_adapters(same=False), kind)
    assert loss > 0 and grad.abs().max() > 0


def test_only_the_student_gets_a_gradient():
    model, net = two_adapters(same=False)
    opd_gradient(model, net)
    assert {n.rsplit(".", 1)[1] for n, p in net.named_parameters() if p.grad is not None} == {"student"}


def test_opd_brings_the_student_to_its_teacher(here):
    """With one teacher and no anchor the KL falls to a fraction: the student started from the base, the teacher is a random other model."""
    teacher = make_teacher(here / "t.pt", "ocr")
    train_opd.main(train_opd.Config(**{**OPD, "iters": 25, "batch": 8, "lr": 2e-3}, teachers=[teacher], init="none", lora_r=8, lam=0.0))
    kl = [row["kl"] for row in log("opd")]
    assert min(kl) > 0 and sum(kl[-3:]) < 0.5 * sum(kl[:3])


def test_cold_start_is_the_mean_of_the_teachers_updates(here, teachers):
    train_opd.main(train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers))
    init, want = util.read_pt("runs/opd/init.pt", ["r"]), [tensors(t) for t in teachers]
    key = "joint_blocks.0.x_block.attn.qkv"
    mean = sum(2.0 * torch.einsum("nor,nrd->nod", t[key + ".B"], t[key + ".A"]) for t in want) / 3
    got = init["alpha"] / init["r"] * torch.einsum("nor,nrd->nod", init["tensors"][key + ".B"], init["tensors"][key + ".A"])
    assert init["r"] == 12 and torch.allclose(got, mean, atol=1e-5)


def test_opd_leaves_the_teachers_alone(here, teachers):
    before = {t: Path(t).read_bytes() for t in teachers}
    train_opd.main(train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers))
    assert sorted(str(p) for p in (here / "ckpt").glob("*")) == sorted(teachers)
    assert all(Path(t).read_bytes() == b for t, b in before.items())


@pytest.mark.parametrize("other", tiny.TASKS)
def test_a_prompt_is_pulled_to_the_teacher_of_its_own_task_and_to_no_other(here, teachers, other):
    """On OCR prompts and without an anchor, another OCR teacher makes another student; another teacher of anything else does not."""
    cfg = dict(**{**OPD, "iters": 1}, teachers=teachers, init="none", lam=0.0, ratio=["geneval=0", "ocr=1", "quality=0"])
    train_opd.main(train_opd.Config(**cfg, name="before"))
    make_teacher(here / f"ckpt/{other}.pt", other, seed=99)
    train_opd.main(train_opd.Config(**cfg, name="after"))
    change = closest(tensors("runs/before/student.pt"), tensors("runs/after/student.pt"))
    assert change > 0 if other == "ocr" else change == 0


VARIANTS = [dict(objective="velocity"), dict(objective="pg"), dict(objective="pg", credit="future"), dict(objective="pg", reward="sampled"),
            dict(objective="pg", reward="sampled", credit="future"), dict(objective="released"), dict(rollout="ode"), dict(rollout="cps", noisy=[0, 3]),
            dict(rollout="ode", objective="velocity", one=True), dict(noisy=[0, 2], supervised=[1, 4]), dict(extrapolate=1.25), dict(blend=0.2),
            dict(guidance=2.0, match="fold"), dict(guidance=2.0, match="branches"), dict(init="truncate", lora_r=2), dict(init="factors"), dict(init="none")]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
def test_every_variant_trains(here, teachers, variant):
    """It runs, changes the student, and logs the closed-form KL of the states it supervised."""
    train_opd.main(train_opd.Config(**{**OPD, "noisy": [0, 4], "iters": 1, **variant}, teachers=teachers))
    row = log("opd")[0]
    assert row["kl"] > 0 and row["grad_norm"] > 0 and closest(tensors("runs/opd/init.pt"), tensors("runs/opd/student.pt")) > 0


def test_credit_and_the_groups_baseline_reach_the_update(here, teachers):
    """Three policy gradients from the same rollout: own reward, future rewards, and own reward with every trajectory its own group."""
    cfg = {**OPD, "noisy": [0, 4], "iters": 1, "teachers": teachers, "objective": "pg", "reward": "sampled", "lam": 0.0, "batch": 2}
    for name, how in (("own", {}), ("future", dict(credit="future"))):
        train_opd.main(train_opd.Config(**{**cfg, **how}, name=name))
    own, future = tensors("runs/own/student.pt"), tensors("runs/future/student.pt")
    assert closest(own, future) > 0
    train_opd.credited, real = lambda reward, group, credit: reward, train_opd.credited
    try:
        train_opd.main(train_opd.Config(**cfg, name="bare"))
    finally:
        train_opd.credited = real
    assert closest(own, tensors("runs/bare/student.pt")) > 0


@pytest.mark.parametrize("reward, credit", [("sampled", "future"), ("dense", "step")])
def test_policy_gradient_gets_each_supervised_steps_own_numbers(here, teachers, monkeypatch, reward, credit):
    """Before the first update the ratio is 1 at every step, and the advantage is the credited reward of these very steps."""
    seen = []
    monkeypatch.setitem(train_opd.OBJECTIVES, "pg", lambda v, v_target, s, cfg: seen.append((v.detach(), v_target, s)) or train_opd.pg(v, v_target, s, cfg))
    cfg = train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers, objective="pg", reward=reward, credit=credit, lam=0.0, supervised=[1, 4])
    train_opd.main(cfg)
    assert [len(s.x) for *_, s in seen] == [8, 8, 8] and all(torch.equal(now.x_next, then.x) for (*_, now), (*_, then) in zip(seen, seen[1:]))
    for v, _, s in seen:
        torch.testing.assert_close(train_opd.log_prob(s.x_next, *train_opd.gaussian(v, s)), s.logp)
    rewards = torch.stack([train_opd.step_reward(v, v_target, s, cfg) for v, v_target, s in seen], 1)
    torch.testing.assert_close(torch.stack([s.adv for *_, s in seen], 1), train_opd.credited(rewards, 2, credit), rtol=1e-3, atol=1e-6)
    train_opd.main(dataclasses.replace(cfg, name="two", updates=2))
    row = log("two")[0]                                    # the second update's ratios are no longer 1
    assert row["ratio_err"] < 1e-5 and 0 < row["clip_frac"] <= 0.5


def test_two_ranks_draw_the_same_single_states(here, teachers):
    args = ["--model", BASE, "--iters", "1", "--steps", "4", "--noisy", "0", "1", "--rollout", "ode", "--objective", "velocity", "--one", "--batch", "8", "--group", "2",
            "--updates", "1", "--device", "cpu", "--teachers", *teachers]
    for ranks in (1, 2):
        assert torchrun(ranks, "train_opd.py", *args, "--name", f"ranks{ranks}").returncode == 0
    assert log("ranks1")[0]["kl"] == pytest.approx(log("ranks2")[0]["kl"], rel=1e-4)


def test_targets_are_the_routed_blended_and_extrapolated_velocities(here, teachers):
    model = models.load(BASE)
    net, theirs = model.mmdit, {}
    for path in teachers:
        teacher = adapters.read(path, net)
        theirs[teacher["task"]] = teacher
        net.add_adapter(teacher["task"], teacher["r"], teacher["alpha"], teacher["tensors"])
    names, text = list(theirs), encode(model.text, ["a photo of a red circle"] * 3)
    x, t, routed = torch.randn(3, *model.latent_shape()), torch.full((3,), 0.6), torch.tensor([2, 0, 1])
    base = velocity(net, x, t, text, 2.0)
    by_name = [velocity(net, x, t, text, 2.0, name) for name in names]

    def target(**how):
        return train_opd.target(train_opd.Config(guidance=2.0, **how), theirs, net, routed, x, t, text)
    own = torch.stack([by_name[k][i] for i, k in enumerate(routed)])
    others = torch.stack([sum(by_name[k][i] for k in range(3) if k != own_k) / 2 for i, own_k in enumerate(routed)])
    torch.testing.assert_close(target(), own, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(blend=0.3), 0.7 * own + 0.3 * others, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target(extrapolate=1.5), base + 1.5 * (own - base), rtol=1e-4, atol=1e-5)
    null, cond = target(match="branches").chunk(2, 1)
    torch.testing.assert_close(null + 2.0 * (cond - null), own, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(null, cond)


def test_folded_student_runs_without_guidance_and_its_teachers_with_it(here, teachers, monkeypatch):
    seen, real = [], train_opd.velocity

    def spy(net, x, t, text, guidance=1.0, adapter=None):
        seen.append((guidance, "student" if adapter == "student" else "teacher"))
        return real(net, x, t, text, guidance, adapter)
    monkeypatch.setattr(train_opd, "velocity", spy)
    guided, real_rollout = [], train_opd.rollout
    monkeypatch.setattr(train_opd, "rollout", lambda *a, **k: guided.append(a[4]) or real_rollout(*a, **k))
    train_opd.main(train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers, guidance=2.0, match="fold"))
    assert set(seen) == {(1.0, "student"), (2.0, "teacher")} and set(guided) == {1.0}


def test_sft_brings_the_student_to_its_teachers_pictures(here, teachers):
    """The loss on the teachers' pictures falls below the base's, resumes bit-exactly, and the result is a cold start of stage 2."""
    import train_sft
    cfg = dict(model=BASE, teachers=teachers, samples=40, steps=3, iters=40, batch=16, lora_r=8, lora_alpha=16.0, lr=3e-3, device="cpu", save_every=20)
    train_sft.main(train_sft.Config(**cfg))
    losses = [row["loss"] for row in log("sft")]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    whole = tensors("runs/sft/student.pt")
    calls, real = [], train_sft.flow_loss

    def stopped(*args):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return real(*args)
    train_sft.flow_loss = stopped
    try:
        with pytest.raises(KeyboardInterrupt):
            train_sft.main(train_sft.Config(**cfg, name="cut"))
        train_sft.main(train_sft.Config(**cfg, name="cut"))
    finally:
        train_sft.flow_loss = real
    assert len(calls) == 25 + 20 and closest(whole, tensors("runs/cut/student.pt")) == 0
    train_opd.main(train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers, init="runs/sft/student.pt"))
    assert closest(whole, tensors("runs/opd/init.pt")) == 0


def test_flow_loss_is_zero_for_the_true_velocity():
    import train_sft
    x_0, eps, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])

    def net(x_t, t, context, pooled, adapter):
        torch.testing.assert_close(x_t, (1 - t.view(3, 1, 1, 1)) * x_0 + t.view(3, 1, 1, 1) * eps)
        return eps - x_0
    text = encode(models.load(BASE).text, [""] * 3)
    assert train_sft.flow_loss(net, x_0, t, eps, text, None).abs().max() < 1e-10


def test_mar_is_felt_on_every_task_and_absent_without_lam(here, teachers):
    runs = {lam: train_opd.main(train_opd.Config(**{**OPD, "iters": 1}, teachers=teachers, lam=lam, name=f"lam{lam}", ratio=["geneval=0", "ocr=1", "quality=0"])) for lam in (0.0, 1.0)}
    assert set(runs) == {0.0, 1.0}
    a, b = tensors("runs/lam0.0/student.pt"), tensors("runs/lam1.0/student.pt")
    assert any(not torch.equal(a[k], b[k]) for k in a)
    assert log("lam0.0")[0]["kl_anchor"] == 0 < log("lam1.0")[0]["kl_anchor"]
    assert log("lam1.0")[0].keys() >= {"kl_ocr"} and "kl_geneval" not in log("lam1.0")[0]


# ------------------------------------------------------------------ ranks, resume


def closest(a, b):
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("script, args, result", [
    ("train_grpo.py", ["--tasks", "ocr", "quality", "--batch", "16", "--group", "4", "--updates", "2", "--lora-r", "4"], "adapter.pt"),
    ("train_opd.py", ["--batch", "16", "--group", "2", "--updates", "2", "--teachers"], "student.pt"),
    ("train_grpo.py", ["--tasks", "ocr", "quality", "--batch", "16", "--group", "4", "--updates", "2", "--full", "--lr", "1e-4"], "adapter.safetensors"),
    ("train_opd.py", ["--batch", "16", "--group", "2", "--updates", "2", "--full", "--lr", "1e-4", "--checkpointing", "--teachers"], "student.safetensors")],
    ids=["grpo", "opd", "grpo-full-sharded", "opd-full-sharded"])
def test_two_ranks_equal_one_rank_with_the_whole_batch(here, teachers, script, args, result):
    args = ["--model", BASE, "--iters", "2", "--steps", "4", "--noisy", "0", "3", "--device", "cpu", *args] + (teachers if "--teachers" in args else [])
    for ranks in (1, 2):
        done = torchrun(ranks, script, *args, "--name", f"ranks{ranks}")
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = log("ranks1"), log("ranks2")
    for key in set(one[1]) - {"s/it", "images/s", "ratio_err", "clip_frac"}:
        assert one[0].get(key) == pytest.approx(two[0].get(key), rel=2e-3, abs=1e-6), key
    if result.endswith(".pt"):
        start = max(v.abs().max().item() for v in tensors(f"runs/ranks1/{result}").values())
        assert closest(tensors(f"runs/ranks1/{result}"), tensors(f"runs/ranks2/{result}")) < 1e-3 * start
    else:                                 # Adam makes a step of lr out of a gradient that is 0 but for rounding: so the distance as a whole
        one, two = (util.read_pt(f"runs/ranks{n}/state.pt", ["weights"])["weights"] for n in (1, 2))
        base = models.load(BASE).mmdit.state_dict()
        assert sum((one[k] - two[k]).square().sum() for k in one) < 1e-3 ** 2 * sum((one[k] - base[k]).square().sum() for k in one) and one.keys() < base.keys()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
@pytest.mark.parametrize("script", [train_grpo, train_opd])
def test_resume_is_bit_exact(here, teachers, monkeypatch, script, full):
    extra = {**(dict(tasks=["quality"], out="x.pt") if script is train_grpo else dict(teachers=teachers)), "full": full}
    cfg = {**(GRPO if script is train_grpo else OPD), **extra, "iters": 4, "save_every": 2}
    if full:
        cfg["lr"] = 1e-4
    result = ("x.pt" if script is train_grpo else "runs/{}/student.pt").replace(".pt", ".safetensors" if full else ".pt")
    script.main(script.Config(**cfg, name="whole"))
    whole = tensors(result.format("whole"))
    calls, real = [], script.rollout

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)
    monkeypatch.setattr(script, "rollout", stopped)
    with pytest.raises(KeyboardInterrupt):
        script.main(script.Config(**cfg, name="cut"))
    script.main(script.Config(**cfg, name="cut"))
    assert len(calls) == 4 + 2, "the second half only"
    assert closest(whole, tensors(result.format("cut"))) == 0
    assert [row["iter"] for row in log("cut")] == [1, 2, 3, 4]


def test_sharded_run_resumes_bit_exactly(here):
    """FSDP2 on two ranks: four iterations at once, and two and two."""
    args = ["--model", BASE, "--tasks", "quality", "--steps", "4", "--noisy", "0", "3", "--batch", "8", "--group", "4", "--full", "--lr", "1e-4", "--device", "cpu"]
    for name, iters in (("whole", 4), ("cut", 2), ("cut", 4)):
        done = torchrun(2, "train_grpo.py", *args, "--iters", str(iters), "--name", name, "--out", f"{name}.safetensors")
        assert done.returncode == 0, done.stderr[-2000:]
    whole = tensors("whole.safetensors")
    assert max(v.abs().max() for v in whole.values()) > 0 and closest(whole, tensors("cut.safetensors")) == 0
    assert [row["iter"] for row in log("cut")] == [1, 2, 3, 4] and log("cut")[3]["kl"] == log("whole")[3]["kl"]


def test_resume_of_the_base_is_bit_exact(here, monkeypatch):
    cfg = dict(pool=256, vae_steps=2, steps=4, save_every=2, batch=8, width=64, depth=2, device="cpu")
    tiny.main(tiny.Config(**cfg, run="whole", out="whole.safetensors"))
    calls, real = [], tiny.write_model

    def stopped(*args):
        real(*args)
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(tiny, "write_model", stopped)
    with pytest.raises(KeyboardInterrupt):
        tiny.main(tiny.Config(**cfg, run="cut", out="cut.safetensors"))
    tiny.main(tiny.Config(**cfg, run="cut", out="cut.safetensors"))
    cut, whole = load_file("cut.safetensors"), load_file("whole.safetensors")
    assert cut.keys() == whole.keys() and all(torch.equal(cut[k], whole[k]) for k in whole)


def test_minibatches_hold_the_same_images_however_many_ranks():
    one = torch.tensor(util.share(24, 2, 0, 1)).view(2, -1)
    two = torch.stack([torch.tensor(util.share(24, 2, r, 2)).view(2, -1) for r in (0, 1)], 1).flatten(1)
    assert torch.equal(one, two) and sorted(two.flatten().tolist()) == list(range(24)), "and each image appears once"


def test_a_run_of_other_settings_is_not_resumed(here):
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1}, tasks=["ocr"], name="n"))
    with pytest.raises(ValueError, match="another lr"):
        train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1}, tasks=["ocr"], name="n", lr=1.0))


def test_a_longer_run_is_not_passed_off_as_a_shorter_one(here):
    train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 2}, tasks=["ocr"], name="n"))
    with pytest.raises(ValueError, match="holds a run of 2 iterations, more than --iters 1"):
        train_grpo.main(train_grpo.Config(**{**GRPO, "iters": 1}, tasks=["ocr"], name="n"))


# ------------------------------------------------------------------ bad input: one clear line, before any sampling


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def bad_files(here):
    torch.save({"task": Evil()}, here / "evil.pt")
    torch.save({"task": "ocr"}, here / "short.pt")
    good = make_teacher(here / "good.pt", "ocr")
    Path(here / "cut.pt").write_bytes(Path(good).read_bytes()[:5000])
    Path(here / "text.pt").write_text("hello")
    make_teacher(here / "other.pt", "ocr", base="0" * 16)
    make_teacher(here / "second.pt", "ocr")
    make_teacher(here / "dance.pt", "dance")
    make_teacher(here / "misshapen.pt", "ocr", r=5)
    broken = torch.load(good)
    next(iter(broken["tensors"].values()))[0] = float("nan")
    torch.save(broken, here / "nan.pt")


REFUSED = [(dict(objective="pg", rollout="ode"), "needs a density at every supervised step"), (dict(objective="released", noisy=[0, 2], supervised=[0, 3]), "needs a density"),
           (dict(objective="pg", match="branches", guidance=2.0), "--match branches: the density is of the guided output"), (dict(match="fold"), "--match fold --guidance 1"),
           (dict(reward="sampled"), "are for --objective pg"), (dict(objective="pg", credit="future", one=True), "no later supervised steps"),
           (dict(objective="pg", credit="future", supervised=[1, 2]), "no later supervised steps"), (dict(rollout="cps", a=1.5), "--a 1.5 --rollout cps: expected 1 or less"),
           *[({name: value}, f"--{name} {value}: expected a finite number") for name, value in
             (("lr", float("inf")), ("lam", float("nan")), ("guidance", -1.0), ("keep", -1), ("seed", -1), ("extrapolate", float("inf")))],
           (dict(rollout="cps", noisy=[0, 3], supervised=[0, 4]), "its last step has no noise"), (dict(blend=1.0), "0 <= blend < 1"),
           (dict(supervised=[3, 9]), "--supervised .*expected FROM TO"), (dict(init="truncate", lora_r=99), "the exact merge has rank 12"),
           (dict(init="factors", full=True), "is about an adapter's factors"), (dict(init="nowhere.pt"), "nowhere.pt: no such file"), (dict(extrapolate=0.0), "--extrapolate 0")]


@pytest.mark.parametrize("change, message", REFUSED, ids=[m for _, m in REFUSED])
def test_combination_that_makes_no_sense_is_refused_with_the_reason(here, teachers, change, message):
    with pytest.raises(ValueError, match=message) as e:
        train_opd.main(train_opd.Config(**{**OPD, **change}, teachers=teachers))
    assert "\n" not in str(e.value) and not (here / "runs/opd/log.jsonl").exists()


BAD = [
    (train_opd, dict(teachers=[]), "--teachers: got none"),
    (train_opd, dict(teachers=["nowhere.pt"]), "nowhere.pt: no such file"),
    (train_opd, dict(teachers=["evil.pt"]), "evil.pt: .*pickled code is refused"),
    (train_opd, dict(teachers=["cut.pt"]), "cut.pt: "),
    (train_opd, dict(teachers=["text.pt"]), "text.pt: "),
    (train_opd, dict(teachers=["short.pt"]), "short.pt: .*lacks anchor"),
    (train_opd, dict(teachers=["other.pt"]), "other.pt: is an adapter of base 0000"),
    (train_opd, dict(teachers=["good.pt", "second.pt"]), "second.pt: is a second teacher of 'ocr'"),
    (train_opd, dict(teachers=["dance.pt"]), "dance.pt: is trained on 'dance'"),
    (train_opd, dict(teachers=["misshapen.pt"], lam=0.0), "this model wants"),
    (train_opd, dict(teachers=["good.pt"]), "0 of the teachers are marked as the anchor"),
    (train_opd, dict(teachers=["good.pt"], anchor="quality"), "--anchor quality: expected the task of a teacher"),
    (train_opd, dict(teachers=["good.pt"], lam=0.0, ratio=["dance=3"]), "--ratio dance=3"),
    (train_opd, dict(teachers=["good.pt"], lam=0.0, group=3), "--batch 8 with --group 3"),
    (train_opd, dict(teachers=["good.pt"], lam=-1.0), "--lam -1.0"),
    (train_opd, dict(teachers=["good.pt"], lam=0.0, anchor="ocr"), "--anchor ocr: .*--lam > 0"),
    (train_opd, dict(teachers=["good.pt"], lora_r=4), "are for an adapter from --init none"),
    (train_opd, dict(teachers=["good.pt"], updates=0), "--updates 0: expected a finite number greater than 0"),
    (train_opd, dict(teachers=["good.pt"], noisy=[2, 9]), "--noisy"),
    (train_opd, dict(teachers=["nan.pt"]), "nan.pt: .*not a tensor of finite numbers"),
    (train_opd, dict(teachers=["good.pt"], model="nowhere.safetensors"), "nowhere.safetensors"),
    (train_opd, dict(teachers=["good.pt"], model="text.pt"), "expected a safetensors file"),
    (train_grpo, dict(tasks=["dance"]), "--tasks dance: unknown task"),
    (train_grpo, dict(tasks=[]), "at least one"),
    (train_grpo, dict(tasks=["ocr"], reward=["beauty"]), "got 'beauty'"),
    (train_grpo, dict(tasks=["ocr"], reward=["geneval"]), "--reward geneval does not fit task 'ocr'"),
    (train_grpo, dict(tasks=["quality"], reward=["ocr"]), "--reward ocr does not fit task 'quality'"),
    (train_grpo, dict(tasks=["ocr"], a=0.0), "--a 0.0: expected a finite number greater than 0"),
    (train_grpo, dict(tasks=["ocr"], ratio=[1, 2]), "--ratio: got 2 values"),
    (train_grpo, dict(tasks=["ocr"], group=3), "--batch 8 with --group 3"),
    (train_grpo, dict(tasks=["ocr"], group=1), "at least 2"),
    (train_grpo, dict(tasks=["ocr"], noisy=[0, 4], rollout="cps"), "last CPS step"),
    (train_grpo, dict(tasks=["ocr"], device="abacus"), "--device abacus"),
    (evaluation, dict(ckpts=["nowhere.pt"]), "nowhere.pt: no such file"),
    (evaluation, dict(ckpts=["base", "base"]), "second model called 'base'"),
    (evaluation, dict(ckpts=[]), "--ckpts: got none"),
    (evaluation, dict(ckpts=["base"], rows=2), "--rows 2"),
    (evaluation, dict(ckpts=["base"], per_task=3, rows=3), "--per-task 3"),
]


@pytest.mark.parametrize("script, change, message", BAD, ids=[m for _, _, m in BAD])
def test_bad_input_is_one_clear_line_before_any_sampling(here, monkeypatch, script, change, message):
    bad_files(here)

    def sampled(*args, **kwargs):
        raise AssertionError("sampled before the input was checked")
    for name in ("rollout", "sample", "draw_noise"):
        monkeypatch.setattr(script, name, sampled, raising=False)
    defaults = {train_grpo: GRPO, train_opd: OPD, evaluation: dict(model=BASE)}[script]
    with pytest.raises(ValueError, match=message) as e:
        script.main(script.Config(**{**defaults, **change}))
    assert "\n" not in str(e.value)
    assert not Path("pwned").exists() and not Path("runs").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_input_ends_the_process_with_a_code_and_one_line(here, ranks):
    args = ["--model", BASE, "--teachers", "nowhere.pt", "--device", "cpu"]
    if ranks == 1:
        done = subprocess.run([sys.executable, str(ROOT / "train_opd.py"), *args], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.strip() == "error: nowhere.pt: no such file"
    else:
        done = torchrun(2, "train_opd.py", *args)
        assert done.returncode != 0 and done.stderr.count("error: nowhere.pt: no such file") == 1


# ------------------------------------------------------------------ evaluation, options


def test_eval_writes_table_json_and_picture_and_equal_models_score_equal(here, teachers):
    evaluation.main(evaluation.Config(ckpts=["base", teachers[0], f"again={teachers[0]}"], model=BASE, per_task=12, steps=3, rows=3, out="e", device="cpu"))
    results = json.loads(Path("e.json").read_text())["table: mean, standard error, n"]
    assert results["geneval"] == results["again"] and set(results) == {"base", "geneval", "again"}
    row = results["base"]
    assert row["geneval"][0] == pytest.approx(sum(row[t][0] for t in tiny.TAGS) / 6)
    assert row["average"][0] == pytest.approx((row["geneval"][0] + row["ocr"][0] + row["quality"][0]) / 3)
    assert Path("e.md").read_text().count("\n| base ") == 2
    image = tiny.Image.open("e.png")
    assert image.width > 330 + 3 * 96 and image.height > 3 * 96


def test_two_ranks_evaluate_to_the_same_numbers(here, teachers):
    args = ["--model", BASE, "--ckpts", "base", teachers[0], "--per-task", "12", "--steps", "3", "--rows", "3", "--device", "cpu"]
    for ranks in (1, 2):
        done = torchrun(ranks, "eval.py", *args, "--out", f"e{ranks}")
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads(Path(f"e{ranks}.json").read_text())["all scores: mean, standard error"] for ranks in (1, 2))
    for label in one:
        for key in one[label]:
            assert one[label][key] == pytest.approx(two[label][key], abs=1e-4), (label, key)


@pytest.mark.parametrize("script", [train_grpo, train_opd, evaluation, tiny])
def test_every_option_is_read_and_documented(script):
    read = {n.attr for n in ast.walk(ast.parse(inspect.getsource(script))) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "cfg"}
    fields = set(script.Config.__dataclass_fields__)
    assert fields == read & fields, f"never read: {fields - read}"
    assert fields == set(util.field_docs(script.Config)), "each field has its comment, which is its --help"


def test_nothing_but_the_declared_packages_is_imported():
    allowed = {"torch", "safetensors", "transformers", "numpy", "tqdm", "PIL", "huggingface_hub",      # transformers brings the last
               "model", "sampler", "rewards", "util", "tiny", "sd3", "adapters", "prompts", "scorers", "detectors", "deqa", "mini_sd3", "train_grpo", "train_opd", "train_sft"}
    for path in ROOT.glob("*.py"):
        names = re.findall(r"^(\s*)(?:from|import) (\w+)", path.read_text(), re.M)
        optional = {name for indent, name in names if indent} & {"matplotlib"}         # only in a function that was asked for a plot
        at_top = {name for indent, name in names if not indent}
        assert {name for _, name in names} - allowed - optional <= set(sys.stdlib_module_names) and not at_top & optional, path
