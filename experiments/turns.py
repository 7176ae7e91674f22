"""What the benchmarks share: taking turns, the spread of a ratio, and tables."""
import json
import statistics
import time

import torch


def seconds_of(call, device):
    """Seconds of one call, until the GPU has done its work."""
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls, turns, device, least=0.2):
    """{name: function} -> {name: [seconds of a call in turn 1, 2, ...]}.

    A call of less than `least` seconds is repeated within its turn. One turn before is not counted.
    Every second turn goes backwards: ours, theirs, theirs, ours.
    """
    repeats = {}
    for name, call in calls.items():
        seconds_of(call, device)
        repeats[name] = max(1, round(least / seconds_of(call, device)))
    seconds = {name: [] for name in calls}
    for turn in range(turns):
        for name, call in list(calls.items())[::1 if turn % 2 == 0 else -1]:
            total = sum(seconds_of(call, device) for _ in range(repeats[name]))
            seconds[name].append(total / repeats[name])
    return seconds


def spread(values):
    """[lower quartile, median, upper quartile], to four digits."""
    quartiles = [values[0]] * 3
    if len(values) > 1:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return [float(f"{q:.4g}") for q in quartiles]


def ratio(theirs, ours):
    """The spread of theirs / ours, turn by turn: above 1 ours is faster."""
    return spread([a / b for a, b in zip(theirs, ours)])


def utilisation(flops, seconds, product_flops, product_seconds):
    """FLOPs per second of a call over those of a matrix product.

    "turns": the spread of turn by turn, so that what else runs on the machine slows both; "best":
    of the fastest turn of each.
    """
    rates = [flops / s for s in seconds]
    products = [product_flops / s for s in product_seconds]
    return {"turns": spread([a / b for a, b in zip(rates, products)]),
            "best": round(max(rates) / max(products), 3)}


def say(part, row):
    print(part, json.dumps(row), flush=True)


def show(value):
    """A number, or a spread [lower quartile, median, upper quartile], for a table."""
    if isinstance(value, list):
        low, middle, high = value
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"
    return str(value)


def flat(row, prefix=""):
    """{"a": {"b": 1}} -> {"a, b": 1}"""
    cells = {}
    for key, value in row.items():
        if isinstance(value, dict):
            cells |= flat(value, f"{prefix}{key}, ")
        else:
            cells[prefix + key] = value
    return cells


def table(rows):
    """Rows as a Markdown table. A row may lack columns."""
    rows = [flat(row) for row in rows]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [show(row[column]) if column in row else "" for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
