"""One HTML file that shows a run token by token, and the film of its training. It needs no server and no network.

`write_page` fills the template page.html with one block of JSON. M moments, n shown tokens, E experts, K experts per token
(the most of all variants; a pair that is off has the expert 255), L linears of an expert:

  title        str                             source       "film" (M moments) or "model" (a saved model, M = 1)
  notes        [str], under the title          experts, topK, tau    numbers
  layers       [str], names                    linears      [str], names, such as "in" and "out"
  normalize    bool, default true: a token's K weights sum to 1
  agreement    null (not measured in this run), or {kappa, error}: how often other batches give the same flags
  tokens       [{text, joined (to the token before), example (its number), patch: null or [row, column]}]
  examples     [{kind: "text" or "picture", gold, fields: [[name, first, end]], image: null or "data:image/png;base64,...",
               grid: null or [rows, columns], question: null or str}]. A field is a sentence. It has the tokens first to
               end - 1, counted from 0 in the example. What lies in no field is shown as a special token.
  variants     [{name, look: 0 to 4, how it is drawn, see lab.report.styles (default: its place here), loss: "none", "ce",
               "mse" or "reroute", select (the pairs that get it): "conflict", "random" (the placebo) or "all", drawn: bool,
               by dice, without a router that learns, equal: bool, default false (a token's experts have equal weights),
               beta, steps: [M], delta: null or the distance of a moment and its twin in steps, loss_curve: [M] (null where
               it was not finite), answers: [M][example] of str, layers: one per layer}]

A layer of a variant. Loads, histogram and curves are those of the whole batch, also where fewer of its tokens are shown:

  logits       (M, n, E), -inf: inactive      cosines      (M, n, K, L), with the mean gradient of the pair's expert
  experts      (M, n, K) uint8                 norms        (M, n, K), log10 of the length of the gradient
  state        (M, n, K) uint8: 0 not judged, 1 judged, 2 in conflict
  best         (M, n, K) uint8, where reroute would send the pair; 255: unknown
  load         [M][E], shares of the pairs     conflicts    [M][E], shares of each expert's pairs
  histogram    [M][20], counts of similarities in equal bins from -1 to 1
  conflict_ratio, consistency, margin, moved   [M]; null where unknown (moved: where there is no twin)
  matrices     [{moment, expert, pairs: [[token, k]] in the order to draw, cosines: (p, p)}]

Shapes in parentheses are arrays from `pack`. A similarity is the mean of a pair's cosines.
"""

import base64
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lab.moe.film import CONFLICT, UNKNOWN, read_film
from lab.report.styles import looks_of
from lab.run.cli import Parser, UserError, number, path, printable, run_main, say
from lab.run.files import written
from lab.run.runs import PAGE, read_record

# ---- 1. The file ----

TEMPLATE = Path(__file__).with_name("page.html")


def pack(array, scale: float, dtype: str) -> dict:
    """An array as small integers times `scale`, in base64, little endian. dtype: int8, uint8 or int16. An infinite value,
    such as the logarithm of a zero length, becomes the smallest or largest. ValueError for NaN and for what does not fit."""
    stored, kind = np.round(np.asarray(array, dtype=np.float64) / scale), np.iinfo(dtype)
    finite = stored[np.isfinite(stored)]
    if np.isnan(stored).any() or (finite < kind.min).any() or (finite > kind.max).any():
        raise ValueError(f"values that do not fit {dtype} with scale {scale:g}")
    stored = stored.clip(kind.min, kind.max).astype(np.dtype(dtype).newbyteorder("<"))
    data = base64.b64encode(stored.tobytes()).decode()
    return {"type": dtype, "shape": list(stored.shape), "scale": scale, "data": data}


def write_page(data: dict, target: Path) -> Path:
    """Fills the template and writes it. Returns the path. A text of the run cannot end the block of JSON or begin a tag."""
    text = json.dumps(data, allow_nan=False)  # ASCII only, so U+2028 and U+2029 are escaped too
    for mark in "<>&":
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    with written(target) as new:
        new.write_text(TEMPLATE.read_text(encoding="utf-8").replace("{{data}}", text), encoding="utf-8")
    return target


# ---- 2. A run ----


def find_runs(run: Path, flag: str, seed: int | None) -> tuple[str, dict[str, str]]:
    """The title of a run, and by variant what its files of one seed may be named after, in the record's order. UserError."""
    record = read_record(run, flag) or {"name": run.name, "runs": []}
    entries = [one for one in record["runs"] if one["variant"] != "dense"]
    seeds = list(dict.fromkeys(one["seed"] for one in entries))
    if seed is not None and seed not in seeds:
        fix = f"has {', '.join(map(str, seeds))}; name one of these" if seeds else "has no record of its seeds; leave it out"
        raise UserError(f"--seed {seed}: {run} {fix}")
    chosen = [one for one in entries if one["seed"] == (seeds[0] if seed is None else seed)]
    title = f"{record['name']}, seed {chosen[0]['seed']}" if chosen else record["name"]
    return title, {f"{o['variant']}{rate}": f"{o['variant']}{rate}-s{o['seed']}" for o in chosen for rate in rates(o)}


def rates(entry: dict) -> tuple[str, str]:
    """The endings of a run's name: without its learning rate, and with it, as runs of --lrs have it."""
    return "", f"-lr{entry['lr']:g}"


def collect(run: str | Path, seed: int | None = None, look: Callable | None = None, flag: str = "--inspect") -> dict:
    """The data of a run's page: from its films or, without any, from its saved models, by `look(folder)`, which returns a
    film of one moment. `run`: its folder, or that of one model. UserError."""
    run = Path(run).expanduser()
    title, names = find_runs(run, flag, seed)
    films = {variant: run / f"film-{name}" for variant, name in names.items()}
    films = {variant: read_film(path, flag) for variant, path in films.items() if path.with_suffix(".json").is_file()}
    if films:
        data = page_data(title, "film", "The examples are training examples: the fixed batch of the film.", films, flag)
        return data | {"agreement": agreement_of(run, names)}
    models = {variant: run / f"model-{name}" for variant, name in names.items()}
    if (run / "config.json").is_file():
        models = {run.name.removeprefix("model-").rpartition("-s")[0] or run.name: run}
    models = {variant: look(path) for variant, path in models.items() if path.is_dir()} if look else {}
    if not models:
        raise UserError(f"{flag} {run} holds no film" + " and no saved model" * bool(look) + "; train with --film")
    note = "The run has no film. The examples are those that a saved model keeps, of dev or test; they form one batch."
    return page_data(title, "model", note, models, flag) | {"agreement": agreement_of(run, names)}


def agreement_of(run: Path, names: dict[str, str]) -> dict | None:
    """How often other batches give the same flags: of the first of these runs whose model lab.report.probe has probed."""
    probed = {one["model"]: one for one in (read_record(run) or {}).get("probes", []) if one["error"] is not None}
    first = next((probed[f"model-{name}"] for name in names.values() if f"model-{name}" in probed), None)
    return first and {"kappa": first["kappa"], "error": first["error"]}


def page_data(title: str, source: str, note: str, films: dict[str, tuple[dict, dict]], flag: str) -> dict:
    """The schema above, of films by variant that show the same examples. UserError where they do not."""
    first, _ = next(iter(films.values()))
    for name, (content, _) in films.items():
        if content["tokens"] != first["tokens"] or len(content["layers"]) != len(first["layers"]):
            raise UserError(f"{flag}: {name} shows other examples than the others; remove its film, or train again")
    run = first["run"]
    data = {"title": f"How tokens choose their experts: {title}", "source": source, "notes": [note], "agreement": None}
    data |= {key: run[key] for key in ("normalize", "tau", "linears")}
    ids = [values.numpy() for _, arrays in films.values() for key, values in arrays.items() if key.endswith(".experts")]
    data["topK"] = int(max((own != UNKNOWN).sum(-1).max(initial=1) for own in ids))  # the pairs that are on come first
    data["experts"] = max(content["run"]["experts"] for content, _ in films.values())
    data |= {
        "layers": [layer["name"] for layer in first["layers"]],
        "tokens": first["tokens"],
        "examples": first["examples"],
    }
    data["variants"] = []
    for name, (content, arrays) in films.items():
        try:
            data["variants"].append({"name": name} | variant_data(content, arrays, source, data["experts"], data["topK"]))
        except ValueError as error:
            raise UserError(f"{flag}: the film of {name} cannot be shown ({error}); remove it, or train again") from None
    for variant, look in zip(data["variants"], looks_of(list(films)), strict=True):
        variant["look"] = look
    return data


def variant_data(content: dict, arrays: dict, source: str, experts: int, top_k: int) -> dict:
    """What the schema has for a variant, but for its name. ValueError for numbers that are not finite."""
    select = "random" if content["run"].get("placebo") else "conflict"
    run = {"select": select, "drawn": False, "equal": False} | content["run"]
    one = {key: run[key] for key in ("loss", "select", "drawn", "equal", "beta")}
    one |= {"steps": content["steps"], "delta": run["delta"] if source == "film" else None}
    one |= {"loss_curve": rounded(content["loss"]), "answers": content["answers"], "layers": []}
    for i, layer in enumerate(content["layers"]):
        count = len(content["steps"])
        own = {key: rounded(layer[key]) for key in layer if key != "name"}
        own["moved"] += [None] * (count - len(own["moved"]))
        for key in ("load", "conflicts"):
            own[key] = [row + [0.0] * (experts - len(row)) for row in own[key]]
        for key, none in (("experts", UNKNOWN), ("state", 0), ("best", UNKNOWN)):
            own[key] = pack(fitted(arrays[f"{i}.{key}"], top_k, none), 1, "uint8")
        for key, size, none in (("logits", experts, -np.inf), ("cosines", top_k, 0), ("norms", top_k, 0)):
            values = fitted(arrays[f"{i}.{key}"].float(), size, none)
            largest = float(abs(values[values > -np.inf]).max(initial=1e-3))
            own[key] = pack(values, largest / 32767, "int16")
        own["matrices"] = [
            {key: place[key] for key in ("moment", "expert", "pairs")}
            | {"cosines": pack(arrays[f"matrix{number}"].numpy() / 127, 1 / 127, "int8")}
            for number, place in enumerate(content["matrices"])
            if place["layer"] == i
        ]
        one["layers"].append(own)
    return one


def fitted(values, size: int, none: float) -> np.ndarray:
    """An array with this size of its third axis, which is cut, or filled up with `none`."""
    fitted = np.full((*values.shape[:2], size, *values.shape[3:]), none, dtype=values.numpy().dtype)
    fitted[:, :, : values.shape[2]] = values[:, :, :size].numpy()
    return fitted


def is_page(file: Path) -> bool:
    """Whether a file was written by `write_page`: it has the template's first lines."""
    first = TEMPLATE.read_text(encoding="utf-8").partition("{{data}}")[0][:500]
    return file.is_file() and file.read_bytes()[: len(first.encode())] == first.encode()


def unpack(array: dict) -> np.ndarray:
    """What `pack` packed."""
    stored = np.frombuffer(base64.b64decode(array["data"]), np.dtype(array["type"]).newbyteorder("<"))
    return stored.reshape(array["shape"]) * array["scale"]


def rounded(value):
    """Numbers with four significant digits, in lists of lists, too. ValueError for those that are not finite."""
    if isinstance(value, list):
        return [rounded(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a number is {value}")
    return float(f"{value:.4g}") if isinstance(value, float) else value


def inspect(run, target: Path, seed: int | None = None, look: Callable | None = None, flags=("--inspect", "--html")) -> Path:
    """Writes the page of a run. An existing file is replaced only where a run wrote it. `flags`: what the user calls run and
    target. UserError."""
    data = collect(run, seed, look, flags[0])
    if target.exists() and not is_page(target):
        raise UserError(f"{flags[1]} {target} exists and is no page of a run: remove it, or name another file")
    try:
        return write_page(data, target)
    except OSError as error:
        raise UserError(f"{flags[1]} {target} cannot be written ({error.strerror}): name another file") from None


def shows_film_alone(run: str | Path) -> bool:
    """Whether a run has films but no saved model."""
    return any(Path(run).glob("film-*.json")) and not any(Path(run).glob("model-*"))


def write_run(folder: Path) -> str:
    """Writes the page of a run that has just ended into its folder. Returns a line that names it, if the run has films:
    a dense model and sample-level routings have none."""
    if not any(folder.glob("film-*.json")):
        return "no page: no variant of this run has a film"
    return f"look at it: {write_page(collect(folder, flag='--output-dir'), folder / PAGE)}"


def describe(run: str | Path, seed: int | None = None, look: Callable | None = None) -> str:
    """A text for the terminal: the last moment of each variant's film, by example, then by token, then by expert."""
    data, parts = collect(run, seed, look), []
    intro = f"  {len(data['examples'])} examples of a batch; conflicts are relative to its mean gradients"
    marks = "  A row: the token, then its experts; ! s: it conflicts there, its cosine with the mean is s; -: not judged"
    parts.append("\n".join([data["title"], *(f"  {note}" for note in data["notes"]), intro, marks]))
    for variant in data["variants"]:
        when = f", after step {variant['steps'][-1]}" * (data["source"] == "film")
        for layer, name in zip(variant["layers"], data["layers"]):
            parts.append(f"{variant['name']}{when}, MoE layer {name}")
            experts, states = (unpack(layer[key])[-1] for key in ("experts", "state"))
            similarity_NK = unpack(layer["cosines"])[-1].mean(-1)
            for i, example in enumerate(data["examples"]):
                answer = variant["answers"][-1][i]
                asked = f"{printable(example['question'])}\n  " if example["question"] else ""
                lines = [f"example {i + 1}: {asked}gold {example['gold']}, answer {answer}"]
                for n, token in enumerate(data["tokens"]):
                    if token["example"] == i:
                        text = token["text"] if token["patch"] is None else "patch {} {}".format(*token["patch"])
                        cells = [
                            f"   {e:>2} {'! ' + format(s, '+.2f') if state == CONFLICT else ' ' if state else '-':<8}"
                            for e, s, state in zip(experts[n], similarity_NK[n], states[n])
                            if e != UNKNOWN
                        ]
                        lines.append(f"  {printable(text):<20.20}{''.join(cells)}".rstrip())
                parts.append("\n".join(lines))
            rows = zip(layer["load"][-1], layer["conflicts"][-1])
            parts.append("\n".join(f"  expert {e:>2}  load {load:.2f}  {ratio:.2f} of its pairs conflict"
                                   for e, (load, ratio) in enumerate(rows)))  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = Parser(prog="lab.report.page", description="Writes the page of a run again, from its films.")
    parser.add_argument("run", type=path("folder"), help="output folder of a run with --film")
    parser.add_argument("--seed", type=number(int, 0), help="the seed that is shown; default: the first")
    parser.add_argument("--output", type=path("new file"), help="default: inspect.html in the run's folder")
    args = parser.parse_args()
    target = Path(args.output or Path(args.run) / PAGE)
    say(f"written: {inspect(args.run, target, args.seed, flags=('the run', '--output'))}")


if __name__ == "__main__":
    run_main("lab.report.page", main, resumes=False)
