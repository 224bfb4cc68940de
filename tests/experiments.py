"""Four systems on the same work: python tests/experiments.py train|quality|samplers|confident|infill|draw|tables

SEDD Absorb, SEDD Uniform, D3PM and GPT (config/absorb.py and so on) on tiny Shakespeare by characters, with equal
tokens, optimisers and parameters (of which a sixth gives GPT, without noise, constants only). Run
`python prepare.py shakespeare_char` and `python prepare.py pydocs --tokenizer=char` first.

train     every training: for each system the best of three learning rates, chosen by validation in runs of a fifth of
          the steps, then three seeds; each diffusion model with the paper's even times and with bell-shaped ones.
          The better times of each, and its rate, train one model on pydocs too.
quality   64 samples of each system, judged by a GPT of another seed, for 8 to 512 network calls, with seconds.
samplers  32 samples of each of three seeds, absorbing and uniform, by each sampler, with and without eta and top_p.
confident 32 samples of each of three seeds, absorbing, by README's new sampler and by Tweedie steps.
infill    hidden parts of held-out passages, written again.
draw      the pictures, in assets/.
tables    the tables of assets/experiments/README.md, and last the short one of README.md.

Stopped at any moment, each command goes on where it was: what is finished is in assets/experiments/. The weights stay
in out/experiments/; those that quality, samplers, confident, infill and draw need and do not find, they train first.
"""

import argparse
import concurrent.futures
import contextlib
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sedd  # noqa: E402
from train import Data, Options, autocast, evaluate, find_device, find_dtype, load_model  # noqa: E402

RESULTS, WEIGHTS = ROOT / "assets" / "experiments", ROOT / "out" / "experiments"
TITLES = {"absorb": "SEDD Absorb", "uniform": "SEDD Uniform", "d3pm": "D3PM Absorb", "gpt": "GPT"}
TIMES = {"logit_normal": "bell-shaped", "uniform": "even"}
SYSTEMS = [(name, times) for times in TIMES for name in TITLES if (name, times) != ("gpt", "uniform")]
RATES, SEEDS, STEPS, SEARCH = (6e-3, 1.2e-2, 2.4e-2), (1, 2, 3), 1000, 200
DIFFUSION, CALLS = ("absorb", "uniform", "d3pm"), (8, 16, 32, 64, 128, 256, 512)
# Under the absorbing graph and log-linear noise the samplers are one: tests/test_theory.py.
SAMPLED = [("absorb", "tweedie"), ("uniform", "tweedie"), ("uniform", "euler"), ("d3pm", "tweedie")]
# Beyond the paper: system, sampler and eta; calls of the network; top_p. `exact` makes a call for each token.
BEYOND = [("absorb", "tweedie", 0.0), ("absorb", "tweedie", 0.05), ("absorb", "exact", 0.0),
          ("uniform", "tweedie", 0.0), ("uniform", "tweedie", 0.05)]  # fmt: skip
BEYOND_CALLS, TOP_P = (16, 64, 256), (1.0, 0.9)
CONFIDENT = [*itertools.product(("tweedie", "confident"), (16, 64, 128))]  # sampler, calls
PLACES = "middle", "prefix", "suffix", "scattered"
lock = threading.Lock()  # the random state is the process's


def data(split, dataset="shakespeare_char"):
    """All tokens of a split, and the meta of the data set."""
    meta = json.loads((ROOT / "data" / dataset / "meta.json").read_text(encoding="utf-8"))
    return torch.from_numpy(np.fromfile(ROOT / "data" / dataset / f"{split}.bin", meta["dtype"]).astype(np.int64)), meta


# -------------------------------------------------------------------------------------------------- training


def name_of(system, rate, seed, steps, dataset="shakespeare_char"):
    return f"{dataset}-{'-'.join(system)}-{rate:g}-seed{seed}-{steps}"


def read(path):
    """The lines of a file of results."""
    lines = (RESULTS / path).read_text().splitlines() if (RESULTS / path).is_file() else []
    return [json.loads(line) for line in lines]


def put(path, text):
    """Write a file of results: all of it, or nothing."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{path}.partial").write_text(text)
    os.replace(RESULTS / f"{path}.partial", RESULTS / path)


def records_of(out):
    """The lines of a log.jsonl but for those of its starts, each of which voids earlier lines of later steps."""
    records = []
    for line in (out / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # blank, or cut off by a kill
            record = json.loads(line)
            if "options" in record:
                records = [earlier for earlier in records if earlier["step"] <= record["step"]]
            else:
                records.append(record)
    return records


def log_of(*run):
    """The lines of a finished run, of which the last has the test split's bound; none before."""
    return read(f"{name_of(*run)}.jsonl")


def run_training(system, rate, seed, steps, dataset="shakespeare_char", weights=False):
    """Train, and test if it is no search for a learning rate, unless there is a log, and, if asked for, the weights."""
    name, times = system
    run = system, rate, seed, steps, dataset
    out = WEIGHTS / name_of(*run)
    if log_of(*run) and not (weights and unfinished(out, steps)):
        return
    meta = ROOT / "data" / dataset / "meta.json"
    if not meta.is_file() or json.loads(meta.read_text(encoding="utf-8"))["tokenizer"] != "char":
        sys.exit(f"experiments.py: data/{dataset} is not there by characters, as all bounds of these tables are: "
                 f"python prepare.py {dataset} --tokenizer=char")  # fmt: skip
    options = dict(dataset=dataset, data_dir=ROOT / "data", out_dir=out, learning_rate=rate, seed=seed, times=times,
                   max_steps=steps, warmup_steps=min(100, steps // 8), init_from="auto")  # fmt: skip
    began = time.perf_counter()
    command = [sys.executable, ROOT / "train.py", ROOT / "config" / f"{name}.py"]
    done = subprocess.run([*command, *(f"--{k}={v}" for k, v in options.items())], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    if log_of(*run):
        return
    records = records_of(out)
    if steps != SEARCH:
        with lock:
            bound, error = test_bound(out, dataset)
        records.append({"test": bound, "test_error": error})
    put(f"{out.name}.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    print(f"{out.name}: {records[-1]}, {time.perf_counter() - began:.0f} s", flush=True)


def unfinished(out, steps):
    return not (out / "ckpt.pt").is_file() or load_model(out / "ckpt.pt")[1]["step"] < steps


def test_bound(out, dataset):
    """Bound (of GPT: the value) over the whole test split, nats per character, and its standard error."""
    model, _ = load_model(out)
    o = Options(dataset=dataset, data_dir=ROOT / "data", block_size=model.config.block_size, eval_only=True,
                eval_split="test", eval_sequences=0, eval_times=8, seed=0)  # fmt: skip
    device = find_device("cpu")
    return evaluate(model, Data(o), o, device, find_dtype("auto", device), f"{out.name}:").values()


def best_rate(system):
    return min(RATES, key=lambda rate: last_validation(log_of(system, rate, SEEDS[0], SEARCH)))


def last_validation(log):
    if not log:
        sys.exit("experiments.py: the trainings are not done yet: python tests/experiments.py train")
    return validations(log)[-1][1]


def validations(log):
    """[(step, value)], whose names are val_nll for GPT and val_bound for the others."""
    names = "val_bound", "val_nll"
    return [(line["step"], line[name]) for line in log for name in names if name in line]


def best_times(name):
    """The times with which this system's validation bound is lower, with the first seed."""
    systems = [s for s in SYSTEMS if s[0] == name]
    return min(systems, key=lambda s: last_validation(log_of(s, best_rate(s), SEEDS[0], STEPS)))


def tests(system):
    """The test split's bounds of the full trainings of a system at its best rate, over the seeds that are done."""
    return [log[-1]["test"] for seed in SEEDS if (log := log_of(system, best_rate(system), seed, STEPS))]


def train(a):
    def all_of(runs):
        with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
            for done in [pool.submit(run_training, *run) for run in runs]:
                done.result()

    all_of((system, rate, SEEDS[0], SEARCH) for system in SYSTEMS for rate in RATES)
    judge = (system := ("gpt", "logit_normal"), best_rate(system), SEEDS[1], STEPS)
    all_of([*((system, best_rate(system), SEEDS[0], STEPS) for system in SYSTEMS), judge])
    winners = [best_times(name) for name in TITLES]
    all_of((system, best_rate(system), seed, STEPS) for seed in SEEDS for system in winners)
    all_of((system, best_rate(system), SEEDS[0], STEPS, "pydocs") for system in winners)
    all_of((system, best_rate(system), seed, STEPS) for seed in SEEDS for system in SYSTEMS)


# --------------------------------------------------------------------------------- samples, judged by another GPT


def run_of(name, seed=SEEDS[0]):
    """What trains a system with its winning times and rate."""
    system = best_times(name)
    return system, best_rate(system), seed, STEPS


def model_of(*which):
    return name_of(*run_of(*which))


def load(*which):
    """The model of that training; where only its log is there, or nothing, it is trained first."""
    run_training(*run_of(*which), weights=True)
    return load_model(WEIGHTS / model_of(*which))[0]


def judged(judge, x):
    """The judge's perplexity of the texts x (B, L), all tokens together, and its standard error over the texts."""
    with torch.no_grad():
        nats = judge(x).mean(-1)
    perplexity = math.exp(nats.mean().item())
    return {"perplexity": perplexity, "perplexity_error": perplexity * nats.std().item() / len(x) ** 0.5}


def entropy(x):
    """Entropy in nats of how often each character is in a text: x (B, L), mean over the texts."""
    return sum(torch.special.entr(torch.bincount(row) / len(row)).sum().item() for row in x) / len(x)


def written(model, prompt, steps, sampler="tweedie", **how):
    """What a model makes of prompt (B, L), in the CPU's dtype; GPT computes its past anew at each token."""
    device = torch.device("cpu")
    with autocast(device, find_dtype("auto", device)):
        return model.generate(prompt, steps, sampler, **how)


def measured(path, key, measure):
    """What `measure` returns for this key (a dict), read from the file at `path` if it has been measured before."""
    key = key | {"judge": model_of("gpt", SEEDS[1])}
    for line in read(path):
        if key.items() <= line.items():
            return line
    line = key | measure()
    put(path, "".join(json.dumps(each) + "\n" for each in [*read(path), line]))
    print(line, flush=True)
    return line


def measurements(path):
    """The lines of a file of results that are of the models and the judge which the trainings chose."""
    models = {None, *(model_of(*which) for which in itertools.product(TITLES, SEEDS))}
    return [line for line in read(path) if line["judge"] == model_of("gpt", SEEDS[1]) and line.get("model") in models]


def quality(a):
    judge = load("gpt", SEEDS[1])
    L = judge.config.block_size
    nothing = torch.full((64, L), -1)

    def sampled(name, steps=0, sampler=""):
        model = load(name, SEEDS[0])
        written(model, nothing[:, :2] if name == "gpt" else nothing, 2)  # warm up
        torch.manual_seed(0)
        began = time.perf_counter()
        x = written(model, nothing, steps, sampler)
        seconds = time.perf_counter() - began
        return judged(judge, x) | {"entropy": entropy(x), "seconds": seconds}

    corpus = data("test")[0]
    corpus = corpus[: len(corpus) // L * L].view(-1, L)
    corpus = corpus[:: len(corpus) // 64][:64]
    measured("quality.jsonl", {"system": "corpus"}, lambda: judged(judge, corpus) | {"entropy": entropy(corpus)})
    measured("quality.jsonl", {"system": "gpt", "model": model_of("gpt")}, lambda: sampled("gpt"))
    for steps in CALLS:
        for name, sampler in SAMPLED:
            key = {"system": name, "model": model_of(name), "steps": steps, "sampler": sampler}
            measured("quality.jsonl", key, lambda: sampled(name, steps, sampler))


def beyond():
    """The runs of `samplers`, but for their seed."""
    for (name, sampler, eta), top_p in itertools.product(BEYOND, TOP_P):
        for steps in BEYOND_CALLS if sampler == "tweedie" else [128]:
            yield {"system": name, "sampler": sampler, "eta": eta, "top_p": top_p, "steps": steps}


def samplers(a):
    judge = load("gpt", SEEDS[1])
    nothing = torch.full((32, judge.config.block_size), -1)
    for seed, run in itertools.product(SEEDS, beyond()):

        def sampled():
            model = load(run["system"], seed)
            torch.manual_seed(0)
            x = written(model, nothing, run["steps"], run["sampler"], top_p=run["top_p"], eta=run["eta"])
            return judged(judge, x) | {"entropy": entropy(x)}

        measured("samplers.jsonl", run | {"model": model_of(run["system"], seed)}, sampled)


def forked_sampler():
    """The sampler that README.md adds to sedd.py, as it stands there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def confident.*?)```", readme, re.DOTALL)
    names = dict(vars(sedd))
    exec(code, names)
    return names["confident"]


def confident(a):
    judge, states_of = load("gpt", SEEDS[1]), forked_sampler()
    nothing, device = torch.full((32, judge.config.block_size), -1), torch.device("cpu")
    for seed, (sampler, steps) in itertools.product(SEEDS, CONFIDENT):

        def sampled():
            model = load("absorb", seed)
            torch.manual_seed(0)
            if sampler == "tweedie":
                x = written(model, nothing, steps)
            else:
                masks = torch.full_like(nothing, model.graph.mask_id)
                with torch.no_grad(), autocast(device, find_dtype("auto", device)):
                    *_, x = states_of(model.scores_at, model.graph, masks, steps, 1.0)
            return judged(judge, x) | {"entropy": entropy(x)}

        key = {"sampler": sampler, "steps": steps, "model": model_of("absorb", seed)}
        measured("confident.jsonl", key, sampled)


def infill(a):
    judge, (corpus, _) = load("gpt", SEEDS[1]), data("test")
    L = judge.config.block_size
    passages = corpus[: len(corpus) // L * L].view(-1, L)[::6][:64]
    measured("infill.jsonl", {"system": "corpus"}, lambda: judged(judge, passages))
    order = torch.arange(L)
    scattered = torch.randperm(L, generator=torch.Generator().manual_seed(0)).argsort()
    ranks = (order - L // 3) % L, order, L - 1 - order, scattered  # the first third of each is hidden
    for where, rank in zip(PLACES, ranks):
        hidden = rank < L // 3

        def infilled(name):
            prompt = torch.where(hidden, -1, passages)
            if name == "gpt":  # it cannot see what follows
                prompt[:, hidden.nonzero()[0, 0] :] = -1
            torch.manual_seed(0)
            x = torch.where(hidden, written(load(name, SEEDS[0]), prompt, 64), passages)
            match = (x == passages)[:, hidden].double().mean(-1)
            error = match.std().item() / len(x) ** 0.5
            return judged(judge, x) | {"match": match.mean().item(), "match_error": error}

        for name in TITLES if where in ("middle", "suffix") else DIFFUSION:
            key = {"where": where, "system": name, "model": model_of(name)}
            measured("infill.jsonl", key, lambda: infilled(name))


# -------------------------------------------------------------------------------------- pictures and tables


COLOURS = {"absorb": "C0", "uniform": "C1", "d3pm": "C2", "gpt": "black"}


def title_of(name, sampler):
    return TITLES[name] + (f", {sampler.title()}" if (name, "euler") in SAMPLED else "")


def draw_samplers(plt, save):
    """Perplexity against calls of `samplers`: a panel for each graph, a line for each way to sample."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    runs = across_seeds("samplers.jsonl", beyond())
    for (name, title), mine in itertools.groupby(runs, lambda run: (run["system"], beyond_title(run))):
        steps, perplexities, spreads = zip(*((run["steps"], run["perplexity"], run["spread"]) for run in mine))
        colour = "C3" if "eta" in title else "C2" if "exact" in title else "C0"
        axes[int(name == "uniform")].errorbar(steps, perplexities, spreads, color=colour, marker=".", capsize=2,
                                              ls=":" if "top_p" in title else "-", label=title)  # fmt: skip
    for name, axis in zip(("absorb", "uniform"), axes):
        axis.set(xscale="log", ylim=(0, None), xlabel="network calls", title=TITLES[name])
        axis.set_xticks([*BEYOND_CALLS, 128], [*BEYOND_CALLS, 128], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8, loc="lower left")
    axes[0].set_ylabel("perplexity under a GPT")
    save(figure, "samplers.svg")


def draw(a):
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "sedd", "axes.spines.top": False,
                                "axes.spines.right": False, "font.size": 10})  # fmt: skip
    import matplotlib.pyplot as plt

    def save(figure, name):
        metadata = {"Date": None} if name.endswith("svg") else {}
        figure.savefig(ROOT / "assets" / name, bbox_inches="tight", dpi=110, metadata=metadata)

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, times in SYSTEMS:
        log = log_of((name, times), best_rate((name, times)), SEEDS[0], STEPS)
        curve = validations(log)
        label = TITLES[name] + ("" if name == "gpt" else f", {TIMES[times]} times")
        axes.plot(*zip(*curve), color=COLOURS[name], ls="--" if times == "uniform" else "-", label=label)
    axes.set(xlabel="training steps", ylabel="validation, nats per character", ylim=(None, 3.2))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "curves.svg")

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    lines = measurements("quality.jsonl")
    for x, axis in zip(("steps", "seconds"), axes):
        for name, sampler in SAMPLED:
            mine = [line for line in lines if line["system"] == name and line["sampler"] == sampler]
            axis.plot([line[x] for line in mine], [line["perplexity"] for line in mine], color=COLOURS[name],
                      ls=":" if sampler == "euler" else "-", marker=".", label=title_of(name, sampler))  # fmt: skip
        gpt, corpus = (next(line for line in lines if line["system"] == s) for s in ("gpt", "corpus"))
        if x == "seconds":
            axis.plot(gpt["seconds"], gpt["perplexity"], "*", color=COLOURS["gpt"])
        else:
            axis.axhline(gpt["perplexity"], color=COLOURS["gpt"], label="GPT, 128 calls, no cache")
        axis.axhline(corpus["perplexity"], color="grey", ls="--", label="held-out text")
        axis.set(xscale="log", yscale="log")
    axes[0].set(xlabel="network calls", ylabel="perplexity under another GPT")
    axes[0].set_xticks(CALLS, CALLS)
    axes[1].set(xlabel="seconds for 64 texts")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, "quality.svg")

    draw_samplers(plt, save)

    rows, length = 21, 56
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
    vocabulary = data("test")[1]["vocab"]
    for name, axis in zip(("absorb", "uniform"), axes):
        states, model = [], load(name, SEEDS[0])
        torch.manual_seed(3)
        sedd.sample(model, model.graph, model.noise, torch.full((1, length), -1), 8 * (rows - 1),
                    callback=lambda i, x: states.append(x[0]))  # fmt: skip
        for row, x in enumerate(states[::8]):
            for column, token in enumerate(x.tolist()):
                if token == model.graph.mask_id:
                    axis.add_patch(plt.Rectangle((column - 0.5, row - 0.42), 1, 0.84, color="0.85", lw=0))
                else:
                    done = all(state[column] == token for state in states[8 * row :])
                    text = vocabulary[token].replace("\n", "¶").replace("$", r"\$")
                    axis.text(column, row, text, ha="center", va="center", family="monospace", fontsize=8,
                              color="black" if done else "C1")  # fmt: skip
        axis.set(xlim=(-1, length), ylim=(rows - 0.4, -0.6), title=TITLES[name], xlabel="position",
                 xticks=[], yticks=[])  # fmt: skip
        axis.spines[:].set_visible(False)
    axes[0].set_ylabel("time, from noise (above) to text (below)")
    save(figure, "writing.png")


def beyond_title(run):
    eta, top_p = f", eta {run['eta']:g}" if run["eta"] else "", f", top_p {run['top_p']:g}" if run["top_p"] < 1 else ""
    return run["sampler"] + eta + top_p


def across_seeds(path, given):
    """The runs given, each with mean and standard deviation of the perplexity, and mean entropy, over seeds."""
    lines, runs = measurements(path), []
    for run in given:
        mine = [line for line in lines if run.items() <= line.items()]
        if len(mine) > 1:
            found = [line["perplexity"] for line in mine]
            told = {"perplexity": statistics.mean(found), "spread": statistics.stdev(found), "seeds": len(mine)}
            runs.append(run | told | {"entropy": statistics.mean(line["entropy"] for line in mine)})
    return runs


def table(head, rows):
    print("\n| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def number(line, name, digits):
    """A figure of a line of results as text, with its standard error if it has one; nothing where it is missing."""
    if name not in line:
        return ""
    error = f" ± {line[f'{name}_error']:.{digits}f}" if f"{name}_error" in line else ""
    return f"{line[name]:.{digits}f}{error}"


def tables(a):
    rows = []
    for system in SYSTEMS:
        name, times = system
        searched = [last_validation(log_of(system, rate, SEEDS[0], SEARCH)) for rate in RATES]
        found = tests(system)
        spread = f" ± {statistics.stdev(found):.3f}" if len(found) > 1 else ""
        pydocs = log_of(system, best_rate(system), SEEDS[0], STEPS, "pydocs")
        pydocs = number(pydocs[-1], "test", 3) if pydocs else ""
        rows.append([TITLES[name], "" if name == "gpt" else TIMES[times],
                     *(f"**{bound:.3f}**" if bound == min(searched) else f"{bound:.3f}" for bound in searched),
                     f"{statistics.mean(found):.3f}{spread}" if found else "", len(found),
                     pydocs])  # fmt: skip
    rates = [f"rate {rate:g}" for rate in RATES]
    table(["system", "times", *rates, f"test, {STEPS} steps", "seeds", "test, pydocs"], rows)

    found = {(r["system"], r.get("sampler"), r.get("steps")): r for r in measurements("quality.jsonl")}
    ends = {title: found.get((name, None, None), {}) for title, name in (("GPT", "gpt"), ("held-out text", "corpus"))}
    for name, digits in ("perplexity", 1), ("entropy", 2), ("seconds", 1):
        rows = [[title_of(*row), *(number(found.get((*row, n), {}), name, digits) for n in CALLS)] for row in SAMPLED]
        table([name, *(f"{n} calls" for n in CALLS)], rows)
        print("\n" + "; ".join(f"{title}: {number(r, name, digits)}" for title, r in ends.items() if name in r))

    rows = [[TITLES[r["system"]], beyond_title(r), r["steps"],
             f"{r['perplexity']:.1f} ± {r['spread']:.1f}", f"{r['entropy']:.2f}", r["seeds"]]
            for r in across_seeds("samplers.jsonl", beyond())]  # fmt: skip
    if rows:
        table(["system", "sampler", "calls", "perplexity", "entropy", "seeds"], rows)

    runs = [{"sampler": sampler, "steps": steps} for sampler, steps in CONFIDENT]
    rows = [[r["sampler"], r["steps"], f"{r['perplexity']:.1f} ± {r['spread']:.1f}", f"{r['entropy']:.2f}", r["seeds"]]
            for r in across_seeds("confident.jsonl", runs)]  # fmt: skip
    if rows:
        table(["sampler", "calls", "perplexity", "entropy", "seeds"], rows)

    found = {(r["system"], r.get("where")): r for r in measurements("infill.jsonl")}
    for name, digits in ("perplexity", 2), ("match", 3):
        rows = [[title, *(number(found.get((system, place), {}), name, digits) for place in PLACES)]
                for system, title in TITLES.items()]  # fmt: skip
        table([name, *PLACES], rows)
    print(f"\nheld-out text: {number(found.get(('corpus', None), {}), 'perplexity', 2)}")

    samples = [r for r in measurements("quality.jsonl") if r.get("steps") in (None, 64) and r.get("sampler") != "euler"]
    samples, rows = {r["system"]: r for r in samples}, []
    for name in TITLES:
        bounds = tests(best_times(name))
        rows.append([TITLES[name], f"{statistics.mean(bounds):.2f}" if bounds else "",
                     number(samples.get(name, {}), "perplexity", 1),
                     *(number(found.get((name, p), {}), "match", 3) for p in ("middle", "scattered"))])  # fmt: skip
    table(["system", "nats per character", "perplexity of samples", "middle filled as it was", "scattered"], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = {f.__name__: f for f in (train, quality, samplers, confident, infill, draw, tables)}
    parser.add_argument("command", choices=commands)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="trainings side by side, a core each")
    a = parser.parse_args()
    if a.command == "train":
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // a.jobs))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    commands[a.command](a)


if __name__ == "__main__":
    main()
