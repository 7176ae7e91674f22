"""Facts about scorers/judge.py, against a local server: it answers well, badly, late or not."""
import base64
import io
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from mini_clip import pictures
from PIL import Image

from scorers.judge import QWEN_VL, UNIFIED_REWARD, UnifiedReward, VLMJudge
from scorers.pixels import to_uint8


class Server:
    """An OpenAI-compatible server on 127.0.0.1.

    answer(request, n) -> (status, body), or None to stay silent; n counts the requests from 0.
    """

    def __init__(self):
        self.requests = []
        self.headers = []
        self.answer = None
        self.busy = 0
        self.most = 0                # requests at a time
        self.lock = threading.Lock()
        self.release = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.reply(self)

            def do_GET(self):        # where a redirection would lead
                server.reply(self)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def reply(self, handler):
        length = int(handler.headers.get("Content-Length", 0))
        request = json.loads(handler.rfile.read(length) or "{}")
        with self.lock:
            n = len(self.requests)
            self.requests.append((handler.path, request))
            self.headers.append(dict(handler.headers))
            self.busy += 1
            self.most = max(self.most, self.busy)
        answer = self.answer(request, n)
        if answer is None:
            self.release.wait(20)
            return
        with self.lock:
            self.busy -= 1
        status, text = answer
        body = text.encode()
        handler.send_response(status)
        if status in (302, 307):
            handler.send_header("Location", self.url + "/elsewhere")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def close(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


def says(text, status=200):
    message = {"role": "assistant", "content": text}
    return status, json.dumps({"choices": [{"message": message}]})


def judge(server, style=UNIFIED_REWARD, **options):
    options = {"timeout": 5, "tries": 3, "pause": 0.01, **options}
    return VLMJudge(server.url, "some-model", **{**style, **options})


def ask_once(server, **options):
    return judge(server, **options)(pictures(1), ["a cat"]).tolist()


def part_of(request, kind):
    content = request["messages"][0]["content"]
    return next(part[kind] for part in content if part["type"] == kind)


def image_of(request):
    url = part_of(request, "image_url")["url"]
    png = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    return Image.open(io.BytesIO(png))


# ------------------------------------------------------------------ what is asked and answered


def test_judge_asks_about_each_image_and_its_prompt(server):
    server.answer = lambda request, n: says("Alignment is fine. Final Score: 3.5")
    images = pictures(2, 8, 12)
    prompts = ["a {cat}", "a dog"]
    scores = judge(server, size=None)(images, prompts)
    assert scores.tolist() == [3.5, 3.5] and scores.dtype == torch.float32
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    for _, request in server.requests:
        caption = re.search(r"Text Caption: \[(.*)\]$", part_of(request, "text"))[1]
        image = to_uint8(images)[prompts.index(caption)]
        assert np.array_equal(np.asarray(image_of(request)), image)
        assert request["model"] == "some-model" and request["temperature"] == 0


def test_unified_reward_sees_512_by_512(server):
    server.answer = lambda request, n: says("Final Score: 1")
    judge(server)(pictures(1, 8, 12), ["a cat"])
    assert image_of(server.requests[0][1]).size == (512, 512)


@pytest.mark.parametrize("style, text, score", [
    (UNIFIED_REWARD, "Final Score: 4", 4),
    (UNIFIED_REWARD, "Final Score:2.25\n", 2.25),
    (UNIFIED_REWARD, "**Final Score:** 5/5", 5),
    (QWEN_VL, "<Thought>sharp</Thought>\n<Score>5</Score>", 5),
    (QWEN_VL, "<Score> 1 </Score>", 1),
])
def test_judge_reads_the_score_in_the_answer(server, style, text, score):
    server.answer = lambda request, n: says(text)
    assert ask_once(server, style=style) == [score]


def test_the_named_judge_asks_where_the_environment_says(server, monkeypatch):
    server.answer = lambda request, n: says("Final Score: 4")
    monkeypatch.setenv("UNIFIEDREWARD_URL", server.url)
    UnifiedReward("cpu", torch.float32)(pictures(1), ["a cat"])
    monkeypatch.setenv("UNIFIEDREWARD_MODEL", "mine")
    UnifiedReward("cpu", torch.float32)(pictures(1), ["a cat"])
    models = [request["model"] for _, request in server.requests]
    assert models == ["UnifiedReward-7b-v1.5", "mine"]


@pytest.mark.parametrize("tail, path", [
    ("", "/v1/chat/completions"),
    ("/", "/v1/chat/completions"),
    ("/chat/completions", "/v1/chat/completions"),
])
def test_an_endpoint_may_be_named_with_its_tail(server, tail, path):
    server.answer = lambda request, n: says("Final Score: 4")
    VLMJudge(server.url + tail, "some-model", **UNIFIED_REWARD)(pictures(1), ["a cat"])
    assert server.requests[0][0] == path


# ------------------------------------------------------------------ servers that fail


@pytest.mark.parametrize("reply", [
    says("I like it"), says("Final Score: none"), says("Final Score: 0"), says("Final Score: 45"),
    says("Final Score: 5.5"), says(None), (200, ""), (200, "<html>"), (200, "[]"), (200, "{}"),
    (200, '{"choices": []}'), (200, '{"choices": [{"message": null}]}'),
    (500, "oops"), (503, ""), (429, "slow down"),
], ids=lambda reply: re.sub(r"\W+", "_", str(reply))[:50])
def test_judge_retries_what_may_pass_and_then_raises_with_the_cause(server, reply):
    server.answer = lambda request, n: reply if n < 2 else says("Final Score: 2")
    assert ask_once(server) == [2] and len(server.requests) == 3
    server.requests.clear()
    server.answer = lambda request, n: reply
    cause = "ValueError: (no )?score .*in the answer"
    if reply[0] != 200:
        cause = f"HTTP {reply[0]}: ?{reply[1]}"
    message = (rf"^judge some-model: got {cause} .*from {server.url} \(try 3 of 3\), "
               "expected a score from 1 to 5; .*$")
    with pytest.raises(ValueError, match=message):
        ask_once(server)
    assert len(server.requests) == 3


@pytest.mark.parametrize("status", [302, 307, 400, 401, 404])
def test_judge_takes_a_refusal_as_final(server, status):
    server.answer = lambda request, n: (status, "model not found")
    message = rf"^judge some-model: got HTTP {status}: model not found from .* \(try 1 of 3\)"
    with pytest.raises(ValueError, match=message):
        ask_once(server)
    # A redirection is not followed: it could take the key elsewhere.
    assert len(server.requests) == 1


def test_judge_gives_up_on_a_server_that_hangs(server):
    server.answer = lambda request, n: None
    start = time.time()
    with pytest.raises(ValueError, match=r"TimeoutError: timed out from .* \(try 2 of 2\)"):
        ask_once(server, timeout=0.2, tries=2)
    assert 0.4 < time.time() - start < 10


def test_judge_survives_one_hang(server):
    server.answer = lambda request, n: None if n == 0 else says("Final Score: 2")
    assert ask_once(server, timeout=0.5) == [2]


def test_judge_names_a_refused_connection(server):
    server.close()
    message = r"got ConnectionRefusedError: .* from http://127.0.0.1:\d+/v1 \(try 3 of 3\)"
    with pytest.raises(ValueError, match=message) as error:
        ask_once(server)
    assert isinstance(error.value.__cause__, ConnectionRefusedError)


def test_judge_backs_off_twice_as_long_each_time(server):
    times = []

    def answer(request, n):
        times.append(time.time())
        return 500, ""

    server.answer = answer
    with pytest.raises(ValueError):
        ask_once(server, pause=0.05, tries=4)
    assert len(times) == 4
    assert all(gap >= 0.05 * 2 ** i for i, gap in enumerate(np.diff(times))), times


# ------------------------------------------------------------------ the key and the way there


def test_judge_sends_the_key_of_the_environment_and_never_prints_it(server, monkeypatch):
    server.answer = lambda request, n: says("Final Score: 2") if n == 0 else (401, "bad key")
    ask_once(server)
    assert "Authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_API_KEY", "secret-123\n")
    with pytest.raises(ValueError) as error:
        ask_once(server)
    assert server.headers[1]["Authorization"] == "Bearer secret-123"
    assert "secret" not in str(error.value) + repr(error.value.__cause__)
    message = "^judge: got white space .* expected one word"
    for key in ("secret\n123", "secret 123", "secret’"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match=message) as error:
            judge(server)
        assert "secret" not in str(error.value)


def test_judge_gives_no_other_key_away_and_needs_no_hub_and_no_proxy(server, monkeypatch):
    server.answer = lambda request, n: says("Final Score: 2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert ask_once(server) == [2] and "secret" not in str(server.headers)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:8000/v1", "ftp://host/v1", "", "http://"])
def test_judge_refuses_what_is_no_endpoint(endpoint):
    with pytest.raises(ValueError, match="^judge: got endpoint .*, expected a URL such as"):
        VLMJudge(endpoint, "some-model", **QWEN_VL)


# ------------------------------------------------------------------ many at a time


NUMBERS = [str(i) for i in range(8)]         # as prompts


def test_judge_asks_at_once_and_keeps_the_order(server):
    def answer(request, n):
        i = int(part_of(request, "text").split("[")[1].rstrip("]"))
        time.sleep(0.3 - 0.03 * i)           # the last asked answers first
        return says(f"Final Score: {1 + i / 2}")

    server.answer = answer
    scores = judge(server, workers=8)(pictures(8, 8, 8), NUMBERS)
    assert scores.tolist() == [1 + i / 2 for i in range(8)]
    assert server.most > 2
    server.most = 0
    judge(server, workers=2)(pictures(4, 8, 8), NUMBERS[:4])
    assert server.most == 2


def test_judge_stops_asking_once_one_image_failed(server):
    def answer(request, n):
        return (400, "bad") if "[0]" in part_of(request, "text") else (500, "later")

    server.answer = answer
    start = time.time()
    with pytest.raises(ValueError, match="HTTP 400: bad"):
        judge(server, workers=2, pause=30)(pictures(8, 8, 8), NUMBERS)
    while any(thread.name.startswith("ThreadPoolExecutor") for thread in threading.enumerate()):
        assert time.time() - start < 20, "a thread still waits to ask again"
        time.sleep(0.05)
    assert len(server.requests) < 8
