"""``diffusers-sde prepare``: the two training sets of the embedded models as image folders.

    diffusers-sde prepare fashion-mnist --output_dir data/fashion_mnist
    diffusers-sde prepare noto-emoji --output_dir data/noto_emoji

Knows the command's arguments; :mod:`diffusers_sde.training.prepare` does the work and is imported when it is wanted.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments: one nested command a data set."""
    sets = parser.add_subparsers(dest="data_set", required=True)
    for name, text in {
        "fashion-mnist": "Fashion-MNIST from the IDX files of the Debian package dataset-fashion-mnist.",
        "noto-emoji": "Google's Noto emoji from the npm package emoji-datasource-google.",
    }.items():
        sub = sets.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        sub.add_argument("--output_dir", required=True, help="New folder to write to.")
        if name == "fashion-mnist":
            sub.add_argument("--source", help="Folder of the IDX files; without it that of the Debian package.")
            sub.add_argument("--split", choices=("train", "test"), default="train", help="Part of the data set.")
        else:
            sub.add_argument("--source", help="Tarball or folder of the npm package; without it npm fetches it.")
            sub.add_argument("--resolution", type=int, default=32, help="Side of the images in pixels.")


def run(args: argparse.Namespace) -> int:
    """The subcommand: write the folder and say what is in it; returns the exit status."""
    from diffusers_sde.training import prepare
    from diffusers_sde.training.framing import DataError

    try:
        prepare.check_output(args.output_dir)
        if args.data_set == "fashion-mnist":
            count = prepare.prepare_fashion_mnist(args.output_dir, args.source or prepare.FASHION_FOLDER, args.split)
        else:
            count = prepare.prepare_noto_emoji(args.output_dir, args.source, args.resolution)
    except DataError as error:
        print(f"diffusers-sde prepare: {error}", file=sys.stderr)
        return 2
    print(f"{count} images in {args.output_dir}")
    return 0
