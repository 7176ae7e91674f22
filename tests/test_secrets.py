"""Secrets of the environment reach no file that a script writes, and no error message."""
import json
from pathlib import Path

import pytest
import torch
from tiny_runs import BASE, grpo, make_teacher, opd

import checkpoints.__main__ as convert
import eval as evaluation
import scorers
import train_sft
from scorers.judge import UNIFIED_REWARD, UnifiedReward, VLMJudge

MARK = "53cr37"
SECRETS = {"HF_TOKEN": f"hf_{MARK}", "HUGGING_FACE_HUB_TOKEN": f"hf_{MARK}",
           "WANDB_API_KEY": MARK, "OPENAI_API_KEY": f"sk-{MARK}", "AWS_SECRET_ACCESS_KEY": MARK,
           "UNIFIEDREWARD_URL": f"https://judge.example/{MARK}/v1"}


@pytest.fixture
def secrets(monkeypatch):
    monkeypatch.setattr(scorers, "LOADED", {})
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def files_with(text):
    return [path for path in Path().rglob("*")
            if path.is_file() and text.encode() in path.read_bytes()]


def test_no_file_of_a_run_has_a_secret(here, secrets, monkeypatch):
    choice = {"message": {"content": "Final Score: 3"}}
    monkeypatch.setattr(VLMJudge, "post", lambda self, body: json.dumps({"choices": [choice]}))
    grpo(tasks=["ocr"], reward=["unifiedreward"], iters=1, keep=1)
    teacher = make_teacher(here / "ocr.pt", "ocr")
    opd(teachers=[teacher], lam=0.0, iters=1)
    train_sft.main(train_sft.Config(model=BASE, teachers=[teacher], iters=1, samples=4, batch=4,
                                    steps=2, device="cpu"))
    evaluation.main(evaluation.Config(model=BASE, tasks=["quality"], per_task=12, rows=1, steps=1,
                                      also=["unifiedreward"], device="cpu"))
    for to, out in (("pt", "new.pt"), ("peft", "folder"), ("diffusers", "new.safetensors")):
        convert.main(convert.Config(ckpts=[teacher], model=BASE, to=to, out=out))
    written = {path.name for path in Path().rglob("*")}
    expected = {"log.jsonl", "config.json", "state.pt", "adapter.pt", "adapter-1.pt", "student.pt",
                "samples.pt", "eval.json", "new.pt", "adapter_config.json", "new.safetensors"}
    assert expected <= written
    assert files_with("unifiedreward")                  # the search finds what is there
    assert files_with(MARK) == []


# ------------------------------------------------------------------ a judge's endpoint


@pytest.mark.parametrize("url", [f"https://user:{MARK}@judge.example/v1",
                                 f"https://{MARK}@judge.example/v1",
                                 f"https://judge.example/v1?key={MARK}",
                                 f"user:{MARK}@judge.example"])
def test_a_secret_in_an_endpoint_is_refused_and_not_printed(url):
    with pytest.raises(ValueError, match="with a user name, a password or a query") as error:
        VLMJudge(url, "some-model", **UNIFIED_REWARD)
    assert MARK not in str(error.value)


@pytest.mark.parametrize("host", ["judge.example", "10.0.0.7", "192.168.1.2", "localhost.example",
                                  "0.0.0.0", "127.0.0.1.example"])
def test_images_go_to_another_machine_only_over_https(monkeypatch, host):
    monkeypatch.delenv("JUDGE_HTTP", raising=False)
    with pytest.raises(ValueError, match="expected https"):
        VLMJudge(f"http://{host}:8000/v1", "some-model", **UNIFIED_REWARD)
    VLMJudge(f"https://{host}:8000/v1", "some-model", **UNIFIED_REWARD)
    monkeypatch.setenv("JUDGE_HTTP", "1")
    VLMJudge(f"http://{host}:8000/v1", "some-model", **UNIFIED_REWARD)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "[::1]"])
def test_this_machine_needs_no_https(host):
    VLMJudge(f"http://{host}:8000/v1", "some-model", **UNIFIED_REWARD)


@pytest.mark.parametrize("endpoint", ["http://localhost:port/v1", "http://localhost:99999/v1",
                                      "http://[::1/v1"])
def test_an_endpoint_that_is_no_url_is_refused(endpoint):
    with pytest.raises(ValueError, match="^judge: got endpoint .*, expected a URL such as"):
        VLMJudge(endpoint, "some-model", **UNIFIED_REWARD)


def test_a_judge_is_asked_only_where_its_url_is_set(monkeypatch):
    monkeypatch.delenv("UNIFIEDREWARD_URL", raising=False)
    with pytest.raises(ValueError, match=r"\$UNIFIEDREWARD_URL is not set"):
        UnifiedReward("cpu", torch.float32)


def test_a_key_that_the_server_repeats_is_not_printed(secrets, monkeypatch):
    def post(self, body):
        raise OSError(f"wrong key sk-{MARK}")

    monkeypatch.setattr(VLMJudge, "post", post)
    judge = VLMJudge("https://judge.example/v1", "some-model", tries=1, **UNIFIED_REWARD)
    with pytest.raises(ValueError, match=r"wrong key \$OPENAI_API_KEY") as error:
        judge(torch.rand(1, 3, 8, 8), ["a cat"])
    assert MARK not in str(error.value) and error.value.__cause__ is None


@pytest.mark.parametrize("url", [f"http://judge.example/{MARK}/v1", f"judge.example/{MARK}/v1",
                                 f"http://localhost:port/v1/{MARK}"])
def test_a_token_in_the_path_of_an_endpoint_that_is_refused_is_not_printed(monkeypatch, url):
    monkeypatch.delenv("JUDGE_HTTP", raising=False)
    with pytest.raises(ValueError, match=r"^judge: got endpoint '.*\*\*\*") as error:
        VLMJudge(url, "some-model", **UNIFIED_REWARD)
    assert MARK not in str(error.value)


def test_a_token_in_the_path_that_the_server_repeats_is_not_printed(monkeypatch):
    def post(self, body):
        raise OSError(f"no such path: /{MARK}/v1")

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(VLMJudge, "post", post)
    judge = VLMJudge(f"https://judge.example/{MARK}/v1", "some-model", tries=1, **UNIFIED_REWARD)
    words = r"no such path: /\*\*\*/v1 from https://judge.example/\*\*\*/v1 "
    with pytest.raises(ValueError, match=words) as error:
        judge(torch.rand(1, 3, 8, 8), ["a cat"])
    assert MARK not in str(error.value) and error.value.__cause__ is None
