"""`interpolate RUN`: images along the path between two real ones in z."""

import argparse

import torch
from torch import Tensor

from ..data import Table
from .common import add_data, add_output, add_run, image_shape, load_rows, noise, open_run, output_path, positive_int, save_images_or_rows


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "interpolate",
        help="draw images between real ones: g along a path from f(x) to f(x')",
        description="Draw what lies between pairs of real images: each row goes from one image to the other, along the great circle "
        "between their z. With a context both are of the same one where the data has two such images, and the context is "
        "interpolated where it has not.",
    )
    add_run(parser)
    add_data(parser)
    parser.add_argument("--pairs", type=positive_int, default=10, metavar="N", help="pairs of images, drawn with --seed (default: 10)")
    parser.add_argument("--steps", type=positive_int, default=11, metavar="N", help="images in a row, with both ends (default: 11)")
    add_output(parser, "interpolation.png", ".png or .npy")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    if options.steps < 2:
        raise ValueError(f"argument --steps: must be at least 2, for both ends; got {options.steps}")
    model, config = open_run(options)
    path = output_path(options, "interpolation.png", (".png", ".npy"))
    if image_shape(config) is None:
        raise ValueError(f"interpolate is for runs trained on images; {options.run_folder} was trained on a table")
    table = load_rows(options, model, config)
    if len(table) < 2:
        raise ValueError(f"data must have at least 2 images to go between; {table.name} has {len(table)}")
    first, second = _pairs(table, options.pairs, noise(options))
    z = model.encode(table, noise(options))
    t = torch.linspace(0, 1, options.steps)
    between = great_circle(z[first], z[second], t).flatten(0, 1)
    context = None
    if table.context is not None:
        context = torch.lerp(table.context[first, None], table.context[second, None], t.double()[:, None]).flatten(0, 1)
    save_images_or_rows(path, model.decode(between, context), model, config, columns=options.steps)
    print(f"{options.pairs} rows of {options.steps} images in {path}")


def great_circle(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """Points between rows of noise, at the radius of typical noise where a straight line would cut inside it (Shoemake 1985).

        sin((1 - t) w) / sin(w) a + sin(t w) / sin(w) b,   w the angle between a and b

    Args:
        a, b: [rows, features].
        t: [steps], 0 at a and 1 at b.

    Returns:
        [rows, steps, features].
    """
    a, b, t = a[:, None], b[:, None], t[:, None]
    w = torch.arccos(torch.cosine_similarity(a, b, -1).clamp(-1, 1))[..., None]
    near = torch.sin(w) < 1e-4  # the same direction, or the opposite one: a straight line
    w = torch.where(near, 1.0, w)
    return torch.where(near, torch.lerp(a, b, t), (torch.sin((1 - t) * w) * a + torch.sin(t * w) * b) / torch.sin(w))


def _pairs(table: Table, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row numbers of pairs, of each context in turn and of the same context where it has two rows."""
    groups = torch.zeros(len(table), dtype=torch.int64)
    if table.context is not None:
        groups = table.context.unique(dim=0, return_inverse=True)[1]
        groups = groups.amax() - groups  # classes, one-hot, then come in ascending order
    pairs = []
    for k in range(count):
        order = torch.randperm(len(table), generator=generator)
        same = order[groups[order] == k % (groups.amax() + 1)]
        pairs.append(torch.stack([same[0], same[1] if len(same) > 1 else order[order != same[0]][0]]))
    return tuple(torch.stack(pairs).unbind(1))
