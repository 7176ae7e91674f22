"""Vision-language models as judges, behind an OpenAI-compatible endpoint (vLLM, SGLang).

    UNIFIEDREWARD_URL=http://127.0.0.1:17140/v1 python train_grpo.py --reward unifiedreward ...

$UNIFIEDREWARD_URL and $QWENVL_URL are the endpoints. $UNIFIEDREWARD_MODEL and $QWENVL_MODEL are the
names of the models on the server. $OPENAI_API_KEY is the key, if the server needs one. A server on
another machine needs https, or JUDGE_HTTP=1 if the network between is yours.
"""
import base64
import http.client
import io
import ipaddress
import json
import os
import re
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from urllib.parse import urlsplit

import torch
from PIL import Image
from torch import nn

from scorers.pixels import check_pairs, to_uint8

# ------------------------------------------------------------------ what is asked

# The question is copied word for word from flow_grpo/rewards.py (unifiedreward_score_sglang), for
# UnifiedReward-7b-v1.5. The model was trained on this form, and other words change its scores.
# flow_grpo also scales the image to 512 x 512.
UNIFIED_REWARD = dict(
    question=(
        "<image>\n"
        "You are given a text caption and a generated image based on that caption. Your task is "
        "to evaluate this image based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided "
        "caption. Consider the accuracy of depicted objects, their relationships, and attributes "
        "as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, "
        "detail preservation, color accuracy, and overall aesthetic appeal.\n"
        "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\n"
        "Text Caption: [{prompt}]"),
    answer=r"Final Score:[\s*]*(\d+(?:\.\d+)?)",
    size=512)

# For a general model such as Qwen2.5-VL. The prompt plays no part.
# DEVIATION: the five levels and the tags are those of flow_grpo/qwenvl.py, but the wording is not.
# So compare a score only with scores that were asked for in these words.
QWEN_VL = dict(
    question=(
        "Judge the visual quality of this image, whatever it shows, on a scale from 1 to 5:\n"
        "1 = bad: very blurred or noisy, badly exposed, the subject cannot be made out, no "
        "composition.\n"
        "2 = poor: visibly blurred, flat light, pale colors, an awkward composition that cuts off "
        "its subject.\n"
        "3 = fair: in focus and well enough lit, but dull in color and plain in composition.\n"
        "4 = good: sharp and well exposed, with vivid colors and a composition that leads to its "
        "subject.\n"
        "5 = excellent: flawless in clarity and exposure, rich in color, and a composition that "
        "moves.\n"
        "First write down your reasons between <Thought> and </Thought>. Then give the score, one "
        "whole number, as in <Score>3</Score>."),
    answer=r"<Score>\s*(\d+(?:\.\d+)?)\s*</Score>")


# ------------------------------------------------------------------ how it is asked


class Refused(Exception):
    """The server answered with another status than 200."""

    def __init__(self, status, text):
        super().__init__(f"HTTP {status}: {text}")
        # A second try would get the same redirection or refusal. 408 and 429 are temporary.
        self.final = 300 <= status < 500 and status not in (408, 429)


def is_local(host):
    """Does this name always mean this machine?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def secrets_in(endpoint):
    """The unusual parts of an endpoint's path. Some servers take a token there."""
    parts = endpoint.partition("://")[2] or endpoint
    return set(parts.split("/")[1:]) - {"", "v1", "chat", "completions"}


def censored(text, secrets):
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


def read_endpoint(endpoint):
    """The URL to which requests go, split. ValueError, which prints no secret, if it will not do.
    """
    shown = censored(endpoint, secrets_in(endpoint))
    if set("@?#") & set(endpoint):
        raise ValueError("judge: got an endpoint with a user name, a password or a query, "
                         "expected a URL such as http://127.0.0.1:8000/v1, and the key in "
                         "$OPENAI_API_KEY")
    base = endpoint.rstrip("/").removesuffix("/chat/completions")
    try:
        url = urlsplit(base + "/chat/completions")
        whole = url.scheme in ("http", "https") and url.hostname and url.port != 0
    except ValueError:                                  # a port that is no number, ...
        whole = False
    if not whole:
        raise ValueError(f"judge: got endpoint {shown!r}, "
                         "expected a URL such as http://127.0.0.1:8000/v1")
    plain = url.scheme == "http" and not is_local(url.hostname)
    if plain and os.environ.get("JUDGE_HTTP") != "1":
        raise ValueError(f"judge: got endpoint {shown!r}, expected https, because images and "
                         "the key would cross the network in clear; JUDGE_HTTP=1 allows it")
    return url


class VLMJudge:
    """A score from 1 to 5 for each image.

        judge = VLMJudge("http://127.0.0.1:17140/v1", "UnifiedReward-7b-v1.5", **UNIFIED_REWARD)

    question: what is asked of each image, with the prompt in place of {prompt}.
    answer: the pattern whose first group is the score. size: scale images to size x size first.
    workers: requests at a time. timeout: seconds that the server may stay silent.
    tries: how often one request is sent, with pauses of pause, 2 pause, 4 pause, ... seconds.
    ValueError if an image has no score after its last try.

    The client is http.client. huggingface_hub.InferenceClient would send the user's Hugging Face
    token to the endpoint where no key is set, follow redirections, use a proxy, and refuse to
    work under HF_HUB_OFFLINE=1.
    """

    def __init__(self, endpoint, model, question, answer, size=None, workers=16, timeout=120,
                 tries=5, pause=1.0, max_tokens=2048):
        self.url = read_endpoint(endpoint)
        self.endpoint = endpoint
        self.model = model
        self.question = question
        self.answer = answer
        self.size = size
        self.workers = workers
        self.timeout = timeout
        self.tries = tries
        self.pause = pause
        self.max_tokens = max_tokens
        self.headers = {"Content-Type": "application/json"}
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        # http.client would refuse such a key too, but its error would print the key.
        if not re.fullmatch(r"[!-~]*", key):
            raise ValueError("judge: got white space or other than ASCII inside $OPENAI_API_KEY, "
                             "expected one word; set it anew")
        self.key = key
        if key:
            self.headers["Authorization"] = f"Bearer {key}"
        self.net = nn.Module()                          # nothing to move

    def __call__(self, images, prompts):
        check_pairs(images, prompts)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self.workers)
        try:
            futures = [pool.submit(self.score_one, array, prompt, stop)
                       for array, prompt in zip(to_uint8(images), prompts)]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()                         # raises the error if it failed
            scores = [future.result() for future in futures]
            return torch.tensor(scores, dtype=torch.float32)
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def score_one(self, array, prompt, stop):
        """Ask until there is a score. stop: an event that ends a pause, and with it the tries."""
        body = self.body(array, prompt)
        for tried in range(1, self.tries + 1):
            final = False
            cause = None
            try:
                return self.parse(self.post(body))
            except Refused as error:
                why = str(error)
                final = error.final
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
                cause = error
            if final or tried == self.tries or stop.wait(self.pause * 2 ** (tried - 1)):
                break
        secrets = secrets_in(self.endpoint)
        if self.key or secrets:                         # some servers repeat them
            why = censored(why.replace(self.key or "***", "$OPENAI_API_KEY"), secrets)
            cause = None
        raise ValueError(f"judge {self.model}: got {' '.join(why.split())[:300]} from "
                         f"{censored(self.endpoint, secrets)} (try {tried} of {self.tries}), "
                         "expected a score from 1 to 5; check that the server is up, serves this "
                         "model, and accepts $OPENAI_API_KEY") from cause

    def body(self, array, prompt):
        """The request, in JSON. array (H, W, 3) uint8."""
        image = Image.fromarray(array)
        if self.size:
            image = image.resize((self.size, self.size))
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        png = base64.b64encode(buffer.getvalue()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
        text = {"type": "text", "text": self.question.replace("{prompt}", prompt)}
        message = {"role": "user", "content": [picture, text]}
        return json.dumps({"model": self.model, "messages": [message], "temperature": 0,
                           "max_tokens": self.max_tokens})

    def post(self, body):
        """The text that answers one request.

        No proxy is used, and no redirection followed: the key goes to this host or nowhere.
        """
        kind = http.client.HTTPConnection
        if self.url.scheme == "https":
            kind = http.client.HTTPSConnection
        connection = kind(self.url.hostname, self.url.port, timeout=self.timeout)
        path = self.url._replace(scheme="", netloc="").geturl()
        try:
            connection.request("POST", path, body, self.headers)
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
        finally:
            connection.close()
        if response.status != 200:
            raise Refused(response.status, text)
        return text

    def parse(self, text):
        """The score in a completion. A ValueError says what was there instead."""
        answer = text
        try:
            answer = json.loads(text)["choices"][0]["message"]["content"]
            score = float(re.search(self.answer, answer)[1])
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"no score in the answer {str(answer)[-200:]!r}") from error
        if not 1 <= score <= 5:
            raise ValueError(f"score {score:g} in the answer {answer[-200:]!r}")
        return score


# ------------------------------------------------------------------ the two that have a name


def from_environment(name, model):
    """(endpoint, model) for the reward called name. model: the default name on the server."""
    url = os.environ.get(f"{name.upper()}_URL")
    if not url:
        raise ValueError(f"reward {name}: is asked of an OpenAI-compatible endpoint, but "
                         f"${name.upper()}_URL is not set, e.g. http://127.0.0.1:8000/v1")
    return url, os.environ.get(f"{name.upper()}_MODEL", model)


class UnifiedReward(VLMJudge):
    def __init__(self, device, dtype):
        url, model = from_environment("unifiedreward", "UnifiedReward-7b-v1.5")
        super().__init__(url, model, **UNIFIED_REWARD)


class QwenVL(VLMJudge):
    def __init__(self, device, dtype):
        url, model = from_environment("qwenvl", "Qwen2.5-VL-7B-Instruct")
        super().__init__(url, model, **QWEN_VL)
