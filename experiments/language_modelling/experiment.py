"""Five architectures, the same parameters, data, budget and tuning: which one models real text best?

Data: a PG-19-shaped shelf of 60 novels, read as contiguous streams with carried state; WikiText-103 (the head of its train
split, the official validation and test), read as packed windows. Both with a BPE of 4096 trained on the train split (`small`) or
the GPT-2 tokenizer (`full`). Every architecture is trained for a shortened budget at the learning rates of one grid, which goes on
by factors of about 3 while the best one is at its end, then at its two best ones for the whole budget (a short run likes higher rates
than a long one). The better of the two on validation is scored on the test split.

`loss by position`: the trained model reads the test split in stretches of 16 training windows, each from an empty state, so every
distance from that start is averaged over the whole split. If the model uses what it read before the training window, the loss falls on
past it; with the state reset at every training window it cannot.

Options (``--option KEY=VALUE``): ``data`` folder with ``pg19-mini`` and ``wikitext-103`` (default: $SEQJAX_SHARED_DATA, else
``../shared/data`` beside the checkout); ``workers`` training runs at a time, each on its share of the cores (default: 2 on a CPU
that has them); ``corpora`` and ``models``, comma-separated, to run a part.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import pathlib
import queue
import subprocess
import sys
from typing import Any

CLAIM = (
    "At equal parameters, data, budget and tuning, recurrent and hybrid language models are on a par with a Transformer on "
    "real text, and with carried state their loss keeps falling past the training window"
)
MODELS = ("transformer", "mamba2", "gated-deltanet", "griffin", "hybrid")
CORPORA = ("pg19", "wikitext103")
STRETCH = 16  # training windows that a state is carried for in `loss by position`


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of one run of the experiment."""

    cost: str
    size: str  # of the presets
    vocabulary: int | None  # of the BPE trained here; None for the GPT-2 tokenizer
    window: int
    batch_size: int
    steps: dict[str, int]  # corpus -> steps of the final runs
    grid_steps: dict[str, int]  # corpus -> steps of each run of the grid
    learning_rates: tuple[float, ...]  # the grid before it is extended
    extensions: int  # most rates added to it per model
    finalists: int  # rates of the grid that are trained for the whole budget
    grid_tokens: int | None  # of the validation split, that the grid is judged by
    validation_tokens: int | None  # in the final scores; None for all
    test_tokens: int | None
    speed_steps: int
    dtype: str = "float32"


SCALES = {
    "smoke": Scale(
        "a minute: checks that it runs",
        "tiny",
        512,
        64,
        4,
        dict.fromkeys(CORPORA, 6),
        dict.fromkeys(CORPORA, 3),
        (3e-3,),
        0,
        1,
        2000,
        2000,
        4000,
        3,
    ),
    "small": Scale(
        "about two hours on 2 CPU cores",
        "tiny",
        4096,
        128,
        8,
        {"pg19": 2000, "wikitext103": 1000},
        {"pg19": 150, "wikitext103": 100},
        (3e-3, 1e-2),
        2,
        2,
        50_000,
        400_000,
        None,
        20,
    ),
    "full": Scale(
        "about 5 minutes per run on an H200",
        "150m",
        None,
        2048,
        32,
        {"pg19": 1500, "wikitext103": 100},
        {"pg19": 300, "wikitext103": 40},
        (5e-4, 1e-3, 2e-3),
        2,
        2,
        None,
        None,
        None,
        20,
        "bfloat16",
    ),
}


def data_folder(options: dict[str, str]) -> pathlib.Path:
    root = pathlib.Path(__file__).resolve().parents[2]
    folder = pathlib.Path(
        options.get("data") or os.environ.get("SEQJAX_SHARED_DATA") or root.parent / "shared" / "data"
    )
    if not (folder / "pg19-mini").is_dir():
        raise FileNotFoundError(f"{folder} has no pg19-mini: name the folder of the texts with --option data=PATH")
    return folder


def prepare_corpora(scale: Scale, texts: pathlib.Path, directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """Token corpora by name; made on the first call."""
    from seqjax.data import PrepareConfig, prepare

    tokenizer: dict[str, Any] = {"train_bpe": scale.vocabulary}
    if scale.vocabulary is None:
        tokenizer = {"tokenizer": str(texts / "tokenizers" / "gpt2" / "tokenizer.json.gz")}
    wikitext = texts / "wikitext-103"
    splits = {
        name: (str(wikitext / f"wiki.{file}.tokens.gz"),)
        for name, file in (("train", "train.head"), ("validation", "valid"), ("test", "test"))
    }
    sources = {
        "pg19": {"source": "pg19", "paths": (str(texts / "pg19-mini"),)},
        "wikitext103": {"source": "wikitext", **splits},
    }
    paths = {}
    for name, source in sources.items():
        paths[name] = directory / "corpora" / name
        print(f"preparing {paths[name]}", flush=True)
        prepare(PrepareConfig(out=str(paths[name]), **source, **tokenizer))
    return paths


def train_config(scale: Scale, model: str, corpus: str, path: pathlib.Path, steps: int, learning_rate: float):
    """The same for every model but for the architecture."""
    from seqjax.data import Corpus, LoaderConfig
    from seqjax.layers import AttentionConfig
    from seqjax.models import preset
    from seqjax.tasks import NextToken
    from seqjax.train import (
        CheckpointConfig,
        EvaluationConfig,
        LoggingConfig,
        OptimizerConfig,
        ScheduleConfig,
        TrainConfig,
    )

    vocabulary = -(-Corpus.open(str(path), "train").vocab_size // 64) * 64
    config = preset(f"{model}-{scale.size}", vocab_size=vocabulary, dtype=scale.dtype)
    # Full attention sees as much as a carried cache of one window holds: the last 2 windows of tokens.
    pattern = tuple(
        dataclasses.replace(mixer, max_length=2 * scale.window)
        if isinstance(mixer, AttentionConfig) and mixer.window is None
        else mixer
        for mixer in config.pattern
    )
    stream = corpus == "pg19"
    return TrainConfig(
        model=dataclasses.replace(config, pattern=pattern),
        task=NextToken(carry=stream),
        data=LoaderConfig(
            path=str(path),
            kind="stream" if stream else "packed",
            window=scale.window,
            batch_size=scale.batch_size,
            # A row crosses hardly any document's end in so short a run: without this no model learns to start from nothing.
            reset_every=STRETCH if stream else None,
        ),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        schedule=ScheduleConfig(warmup=0.1),
        checkpoint=CheckpointConfig(every=0, max_to_keep=1),
        evaluation=EvaluationConfig(every=0),
        logging=LoggingConfig(every=1, tensorboard=False),
        steps=steps,
    )


def train(request: dict[str, Any]) -> dict[str, Any]:
    """Train one model (`grid`, `final`, `speed`) and score it on the validation split."""
    import statistics
    import time

    from seqjax.models import parameter_count
    from seqjax.train import Trainer

    scale = SCALES[request["scale"]]
    path, run = pathlib.Path(request["corpus_path"]), pathlib.Path(request["run"])
    config = train_config(scale, request["model"], request["corpus"], path, request["steps"], request["learning_rate"])
    start = time.perf_counter()
    try:
        Trainer(config, run, resume="auto", quiet=True).run()
    except FloatingPointError as error:
        return {"diverged": str(error)}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {
        "parameters": parameter_count(config.model),
        "train_seconds": time.perf_counter() - start,
        "train_loss": statistics.mean(r["loss"] for r in records[-20:] if "loss" in r),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in records[2:] if "tokens_per_second" in r),
    }
    if request["kind"] != "speed":
        tokens = scale.grid_tokens if request["kind"] == "grid" else scale.validation_tokens
        result["validation"] = carried(run, path, "validation", scale, tokens)
    return result


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Score a final run on the test split: with the state carried through each document, and from an empty state."""
    from seqjax.data import Corpus
    from seqjax.evaluate import perplexity
    from seqjax.train import load_run

    scale = SCALES[request["scale"]]
    path, run = pathlib.Path(request["corpus_path"]), pathlib.Path(request["final"])
    result = {"test": carried(run, path, "test", scale, scale.test_tokens)}
    _, model, _ = load_run(run)
    corpus = Corpus.open(str(path), "test")
    # From an empty state at the start of every window, of the training's length and of 16 times that.
    for name, window, rows in (("reset", scale.window, 16), ("stretch", STRETCH * scale.window, 4)):
        result[name] = perplexity(
            model, corpus, state="reset", window=window, batch_size=rows, max_tokens=scale.test_tokens
        ).to_dict()
    return result


def carried(run: pathlib.Path, path: pathlib.Path, split: str, scale: Scale, max_tokens: int | None) -> dict[str, Any]:
    """Scores of a run with the state carried through each document."""
    from seqjax.data import Corpus
    from seqjax.evaluate import head, perplexity
    from seqjax.train import load_run

    _, model, _ = load_run(run)
    corpus = Corpus.open(str(path), split)
    # A row reads whole documents: more rows than documents in the part to be scored would idle. The window is a matter of cost.
    rows = max(1, min(8, head(corpus, max_tokens).num_documents))
    return perplexity(model, corpus, window=4 * scale.window, batch_size=rows, max_tokens=max_tokens).to_dict()


def run_jobs(requests: list[dict[str, Any]], directory: pathlib.Path, workers: int) -> list[dict[str, Any]]:
    """Each request in its own process, ``workers`` at a time on disjoint cores; finished ones are read from disk."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [None]
    shares: queue.SimpleQueue = queue.SimpleQueue()
    for worker in range(workers):
        shares.put(cores[worker::workers])

    def one(request: dict[str, Any]) -> dict[str, Any]:
        folder = pathlib.Path(request["run"])
        done = folder / "result.json"
        if not done.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "request.json").write_text(json.dumps(request))
            share = shares.get()
            try:
                environment = os.environ | {"EXPERIMENT_CORES": ",".join(map(str, share)) if None not in share else ""}
                with (folder / "log.txt").open("w") as log:
                    code = subprocess.run(
                        [sys.executable, __file__, folder / "request.json"], env=environment, stdout=log, stderr=log
                    ).returncode
            finally:
                shares.put(share)
            if code:
                raise RuntimeError(f"{folder.name} failed with exit code {code}; see {folder / 'log.txt'}")
        result = json.loads(done.read_text())
        print(f"{folder.name}: {describe(result)}", flush=True)
        return result

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, requests))


def describe(result: dict[str, Any]) -> str:
    if "diverged" in result:
        return f"diverged: {result['diverged']}"
    if "test" in result:
        return f"test {result['test']['bits_per_byte']:.4f} bits/byte"
    text = f"train loss {result['train_loss']:.3f}, {result['tokens_per_second']:,.0f} tokens/s"
    if "validation" in result:
        text += f", validation {result['validation']['bits_per_byte']:.4f} bits/byte"
    return text


def run(scale: str, directory: pathlib.Path, options: dict[str, str]) -> dict[str, Any]:
    """Do whatever of the experiment is not done yet and return its tables."""
    sizes = SCALES[scale]
    directory = directory.resolve()
    paths = prepare_corpora(sizes, data_folder(options), directory)
    models = options.get("models", ",".join(MODELS)).split(",")
    corpora = options.get("corpora", ",".join(CORPORA)).split(",")
    on_cpu = sizes.size == "tiny"
    workers = int(options.get("workers", min(2, os.cpu_count() or 1) if on_cpu else 1))

    def request(kind: str, model: str, corpus: str, steps: int, learning_rate: float) -> dict[str, Any]:
        name = f"{kind}-{corpus}-{model}-{learning_rate:g}"
        return {
            "kind": kind,
            "scale": scale,
            "model": model,
            "corpus": corpus,
            "corpus_path": str(paths[corpus]),
            "steps": steps,
            "learning_rate": learning_rate,
            "run": str(directory / name),
        }

    tables: dict[str, list[dict[str, Any]]] = {}
    curves: dict[str, Any] = {}
    for corpus in corpora:
        rates = {model: set(sizes.learning_rates) for model in models}
        losses: dict[str, dict[float, float]] = {model: {} for model in models}
        for extension in range(sizes.extensions + 1):
            grid = [
                request("grid", model, corpus, sizes.grid_steps[corpus], rate)
                for model in models
                for rate in sorted(rates[model] - set(losses[model]))
            ]
            for trial, outcome in zip(grid, run_jobs(grid, directory, workers)):
                losses[trial["model"]][trial["learning_rate"]] = validation_loss(outcome)
            best = {model: min(losses[model], key=losses[model].__getitem__) for model in models}
            if extension < sizes.extensions:
                for model in models:
                    rates[model] |= beyond(best[model], rates[model])
        trials = [
            request("final", model, corpus, sizes.steps[corpus], rate)
            for model in models
            for rate in sorted(losses[model], key=losses[model].__getitem__)[: sizes.finalists]
        ]
        full: dict[str, dict[float, dict[str, Any]]] = {model: {} for model in models}
        for trial, outcome in zip(trials, run_jobs(trials, directory, workers)):
            full[trial["model"]][trial["learning_rate"]] = outcome
        best = {model: min(full[model], key=lambda rate: validation_loss(full[model][rate])) for model in models}
        finals = [full[model][best[model]] for model in models]
        if diverged := [model for model, final in zip(models, finals) if "diverged" in final]:
            raise FloatingPointError(f"{corpus}: every final run diverged of {', '.join(diverged)}")
        scoring = []
        for model in models:
            winner = request("final", model, corpus, sizes.steps[corpus], best[model])
            scoring.append(request("test", model, corpus, 0, best[model]) | {"final": winner["run"]})
        tests = run_jobs(scoring, directory, workers)
        # Alone on the machine, all cores: the only fair time.
        speeds = run_jobs(
            [request("speed", model, corpus, sizes.speed_steps, best[model]) for model in models], directory, 1
        )
        tokens = sizes.steps[corpus] * sizes.batch_size * sizes.window
        tables[f"{corpus}: {tokens:,} training tokens"] = [
            {
                "model": model,
                "parameters": final["parameters"],
                "learning rate": best[model],
                "tokens/s": round(speed["tokens_per_second"]),
                "valid ppl/word": round(final["validation"]["word_perplexity"], 2),
                "valid bits/byte": round(final["validation"]["bits_per_byte"], 4),
                "test ppl/word": round(test["test"]["word_perplexity"], 2),
                "test bits/byte": round(test["test"]["bits_per_byte"], 4),
                f"test bits/byte, reset every {sizes.window}": round(test["reset"]["bits_per_byte"], 4),
            }
            for model, final, test, speed in zip(models, finals, tests, speeds)
        ]
        tried = sorted(set().union(*losses.values()))
        tables[f"{corpus}: learning-rate grid, validation nats/token after {sizes.grid_steps[corpus]} steps"] = [
            {"model": model, **{f"{rate:g}": rounded(losses[model].get(rate)) for rate in tried}} for model in models
        ]
        tried = sorted(set().union(*full.values()))
        tables[f"{corpus}: final runs, validation nats/token after {sizes.steps[corpus]} steps"] = [
            {
                "model": model,
                **{
                    f"{rate:g}": rounded(validation_loss(full[model][rate]) if rate in full[model] else None)
                    for rate in tried
                },
            }
            for model in models
        ]
        if corpus == "pg19":
            curves = {
                model: {name: test[name]["by_window_position"] for name in ("stretch", "reset")}
                for model, test in zip(models, tests)
            }
            tables["pg19: test loss (nats/token) by training windows since the state was empty"] = position_rows(
                curves, sizes.window
            )
            picture = pathlib.Path(__file__).parent / "results" / f"{scale}-loss-by-position.png"
            plot(curves, sizes.window, picture)
    return {"tables": tables, "curves": curves, "workers": workers, "sizes": dataclasses.asdict(sizes)}


def validation_loss(outcome: dict[str, Any]) -> float:
    return math.inf if "diverged" in outcome else outcome["validation"]["nats_per_token"]


def beyond(best: float, rates: set[float]) -> set[float]:
    """The next rate past the best one if that is at an end of the grid, about 3 times as small or as large"""
    added = set()
    if best == min(rates):
        added.add(best / 3)
    if best == max(rates):
        added.add(best * 3)
    return {float(f"{rate:.1g}") for rate in added}


def rounded(value: float | None) -> float | str:
    return "-" if value is None else round(value, 4) if math.isfinite(value) else "diverged"


def mean_loss(buckets: list[dict[str, Any]], low: int, high: int) -> tuple[float, float]:
    """Mean over the buckets that lie in [low, high), and its standard error."""
    chosen = [b for b in buckets if low <= b["start"] and b["stop"] <= high]
    tokens = sum(b["tokens"] for b in chosen)
    if not tokens:
        return float("nan"), float("nan")
    variance = sum((b["tokens"] * b["standard_error"]) ** 2 for b in chosen)
    return sum(b["tokens"] * b["nats_per_token"] for b in chosen) / tokens, variance**0.5 / tokens


def position_rows(curves: dict[str, Any], window: int) -> list[dict[str, Any]]:
    """Mean loss in ranges of distances from the empty state, in training windows."""
    rows = []
    for model, states in curves.items():
        row: dict[str, Any] = {"model": model}
        low = 0
        for high in (1, 2, 4, 8, STRETCH):
            loss, error = mean_loss(states["stretch"], low * window, high * window)
            row[f"{low}-{high} windows"] = round(loss, 4)
            low = high
        row["standard error"] = round(error, 4)
        row["reset every window"] = round(mean_loss(states["reset"], 0, window)[0], 4)
        rows.append(row)
    return rows


def plot(curves: dict[str, Any], window: int, path: pathlib.Path) -> None:
    """Loss by the distance from the empty state: one stretch of 16 windows, and the mean of a state reset at every window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for model, states in curves.items():
        points = [(b["start"], b["nats_per_token"]) for b in states["stretch"] if b["start"] >= 8]
        (line,) = axes.plot(*zip(*points), marker="o", markersize=3, label=model)
        reset = mean_loss(states["reset"], 0, window)[0]
        axes.plot([window, STRETCH * window], [reset] * 2, linestyle=":", linewidth=1, color=line.get_color())
    axes.set_xscale("log", base=2)
    axes.axvline(window, color="grey", linestyle="--", linewidth=1, label="training window")
    axes.plot([], [], color="grey", linestyle=":", linewidth=1, label="state reset every window (mean)")
    axes.set_xlabel("tokens read since the state was empty")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    request_file = pathlib.Path(sys.argv[1])
    wanted = os.environ.get("EXPERIMENT_CORES")
    if wanted:
        # Before jax starts: its thread pool has as many threads as the process may use cores.
        os.sched_setaffinity(0, {int(core) for core in wanted.split(",")})
    work = json.loads(request_file.read_text())
    outcome = score(work) if work["kind"] == "test" else train(work)
    request_file.with_name("result.json").write_text(json.dumps(outcome))
