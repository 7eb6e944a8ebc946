"""The demo of stgc.py as a picture: what the paper's figures 3, 7 and 8 show.

  python -m lab.report.demo demo.png

The model is trained without STGC, then its router on the conflict loss alone. The upper panels show this second phase: the
conflict ratio and the consistency at each step. Below: the similarities of all pairs at its start and end, and the cosine
matrix of the tokens on the busiest expert, ordered by their similarity with the expert's mean.
"""

from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lab.report.figures import save, smooth
from lab.report.styles import STYLES
from lab.run.cli import Parser, run_main, say
from stgc import STGC, Demo, Experts, LayerStep, STGCConfig


class KeptStep(LayerStep):
    """A step that leaves its token gradients with the STGC object."""

    def on_gradient(self, linear: int, grad_SO: Tensor) -> None:
        super().on_gradient(linear, grad_SO)
        self.stgc.kept[linear] = grad_SO
        self.stgc.pairs = self.pairs


class KeepingSTGC(STGC):
    step_type = KeptStep

    def find_layers(self, model):
        self.kept, self.pairs = {}, None
        return super().find_layers(model)


class Moment(NamedTuple):
    """What the last step of a phase found."""

    similarity_N: Tensor  # of the judged pairs
    cosine_NN: Tensor  # of the tokens on one expert, mean over its linears


def moment_of(stgc: KeepingSTGC, expert: int) -> Moment:
    verdict, start, end = stgc.verdicts[0], 0, stgc.pairs.ends_E[expert]
    if expert:
        start = stgc.pairs.ends_E[expert - 1]
    units = [F.normalize(grad_SO[start:end], dim=1) for grad_SO in stgc.kept.values()]
    cosine_NN = torch.stack([unit_NO @ unit_NO.T for unit_NO in units]).mean(0)
    order_N = torch.stack([F.cosine_similarity(unit_NO, unit_NO.mean(0), dim=1) for unit_NO in units]).mean(0).argsort()
    return Moment(verdict.similarity_TK[verdict.judged_TK], cosine_NN[order_N][:, order_N])


def run_demo(steps: int = 200) -> tuple[list[list[float]], Moment, Moment, int]:
    """Rows of conflict ratio, consistency and main loss of the second phase; its first and last moment; and the expert."""
    torch.manual_seed(0)
    model, rows, moments, expert = Demo(Experts(4, 16, 32)), [], [], None
    for config, part in (STGCConfig("none"), model), (STGCConfig(alpha=0.0), model.moe.router):
        stgc, optimizer = KeepingSTGC(model, config), torch.optim.AdamW(part.parameters(), 5e-3)
        rows = [model.fit(stgc, optimizer, 1, alone=config.alpha == 0) for _ in range(steps)]
        expert = stgc.numbers[0]["load"].argmax().item() if expert is None else expert
        moments.append(moment_of(stgc, expert))
    return rows, *moments, expert


def plot_demo(path: Path, steps: int = 200) -> Path:
    rows, before, after, expert = run_demo(steps)
    panels = [["ratio", "consistency"], ["histogram", "histogram"], ["before", "after"]]
    figure, axes = plt.subplot_mosaic(panels, figsize=(9, 11), height_ratios=[3, 3, 4])
    ratio, consistency, main_loss = zip(*rows)
    for name, values, label in ("ratio", ratio, "conflict ratio"), ("consistency", consistency, "gradient consistency"):
        colour, line, _ = STYLES[0]
        axes[name].plot(values, color="#bbbbbb", linewidth=0.8, label="each step")
        axes[name].plot(smooth(list(values)), color=colour, linestyle=line, label="smoothed")
        axes[name].set(xlabel="step on the conflict loss alone", ylabel=label)
        axes[name].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[name].legend(frameon=False)
    loss = f"the main loss, which is not trained here, goes from {main_loss[0]:.2f} to {main_loss[-1]:.2f}"
    figure.suptitle(f"The demo of stgc.py: the router is trained on the conflict loss alone;\n{loss}", fontsize=11)
    looks = {"before": {"histtype": "stepfilled", "color": "#c9c9c9"}, "after": {"histtype": "step", "color": STYLES[1][0]}}
    for name, moment in {"before": before, "after": after}.items():
        settings = {"bins": 40, "range": (-1, 1), "density": True, "linewidth": 2} | looks[name]
        axes["histogram"].hist(moment.similarity_N, label=f"{name}: mean {moment.similarity_N.mean():.3f}", **settings)
        image = axes[name].imshow(moment.cosine_NN, vmin=-1, vmax=1, cmap="cividis", interpolation="nearest")
        title = f"{name}: {len(moment.cosine_NN)} tokens on expert {expert}, mean {moment.cosine_NN.mean():.3f}"
        axes[name].set_title(title, fontsize=10)
        axes[name].set(xlabel="token", ylabel="token")
    axes["histogram"].axvline(0, color="#1b1b1b", linewidth=1)
    axes["histogram"].text(-0.02, 0.97, "conflict", ha="right", va="top", transform=axes["histogram"].get_xaxis_transform())
    axes["histogram"].set(xlabel="similarity of a pair with its expert's mean (eq. 12)", ylabel="density")
    axes["histogram"].legend(frameon=False)
    figure.colorbar(image, ax=[axes["before"], axes["after"]], label="cosine of two tokens' gradients")
    return save(figure, path)


def main() -> None:
    parser = Parser(prog="lab.report.demo", description=__doc__)
    parser.add_argument("file", type=Path, help="the picture to write")
    torch.set_num_threads(1)  # more would only wait for each other
    say(plot_demo(parser.parse_args().file))


if __name__ == "__main__":
    run_main("lab.report.demo", main, resumes=False)
