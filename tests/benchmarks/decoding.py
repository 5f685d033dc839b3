"""Images a second: Pillow and torchvision's v1 transforms against the cache and `domainbed`.

`pillow` is what DomainBed does for every image of every batch: decode the JPEG, RandomResizedCrop,
flip, ColorJitter, RandomGrayscale, ToTensor. `dgavg` gathers the same number of images from the
cache of a folder and augments them as one batch. Both normalise. One thread; the rounds are
interleaved in one process, and medians are printed, by the wall clock and by the time of the
processor, which other work on the machine disturbs less.

    python tests/benchmarks/decoding.py [FOLDER] [--images 96] [--rounds 15] [--per-domain 100]

FOLDER is a tree domain/class/image. Its images are first made JPEGs of 227×227, as PACS's are;
without one, blurred noise is.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms as tv
from PIL import Image, ImageFilter

from dgavg.data import TrainingBatches, load, make_splits

SIZE, SIDE = 224, 227
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def write_jpegs(source, target, per_domain):
    """`per_domain` JPEGs of each domain, 227×227, quality 95."""
    if source is None:
        rng = np.random.default_rng(0)
        images = {}
        for domain in "abcd":
            for i in range(per_domain):
                noise = Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8))
                images[f"{domain}/{i % 2}/{i}"] = noise.filter(ImageFilter.GaussianBlur(2))
    else:
        domains = sorted(p for p in source.iterdir() if p.is_dir() and any(p.glob("*/*.jpg")))
        classes = sorted({p.name for p in domains[0].iterdir() if p.is_dir()})
        images = {}
        for domain in domains:
            for label in classes:
                files = sorted((domain / label).glob("*.jpg"))[: -(-per_domain // len(classes))]
                images |= {f"{domain.name}/{label}/{f.stem}": Image.open(f) for f in files}
    for name, image in images.items():
        path = target / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=95)
    return [target / f"{name}.jpg" for name in images]


def measured(work):
    wall, cpu = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - wall, time.thread_time() - cpu


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--per-domain", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transform = tv.Compose(
        [
            tv.RandomResizedCrop(SIZE, scale=(0.7, 1.0)),
            tv.RandomHorizontalFlip(),
            tv.ColorJitter(0.3, 0.3, 0.3, 0.3),
            tv.RandomGrayscale(),
            tv.ToTensor(),
            tv.Normalize(MEAN, STD),
        ]
    )
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        paths = write_jpegs(options.folder, Path(folder), options.per_domain)
        began = time.perf_counter()
        data = load("folder", root=folder, size=SIZE, workers=1)
        print(f"{len(paths)} JPEGs; decoded into the cache in {time.perf_counter() - began:.2f} s")
        train = range(len(data.domains) - 1)
        batches = {
            name: TrainingBatches(
                data,
                make_splits(data, 0.2, 0),
                list(train),
                batch_size=options.images // len(train),
                seed=0,
                device="cpu",
                augment="domainbed",
                resident=name == "resident",
            )
            for name in ("mapped", "resident")
        }
        n = options.images // len(train) * len(train)
        step = iter(range(10**6))

        def pillow():
            chosen = rng.choice(len(paths), n)
            torch.stack([transform(Image.open(paths[i]).convert("RGB")) for i in chosen])

        def ours(name):
            batches[name](next(step)).x.sub_(mean).div_(std)

        def alone():
            """Without the thread that gathers ahead, whose time is not this thread's."""
            t = next(step)
            images = batches["mapped"]._images
            rng = torch.Generator().manual_seed(t)
            x = batches["mapped"]._augment(images.gather(rows(t)), rng)
            x.sub_(mean).div_(std)

        rows = lambda t: batches["mapped"]._draw(t // 64)[t % 64]  # noqa: E731
        works = {
            "pillow, torchvision v1": pillow,
            "cache: gather, augment": alone,
            "cache: gathered ahead": lambda: ours("mapped"),
            "copied: gather, augment": lambda: ours("resident"),
        }
        times = {name: [] for name in works}
        for turn in range(options.rounds + 1):
            for name, work in works.items():
                found = measured(work)
                if turn:  # the first warms up
                    times[name].append(found)
        first = None
        print(f"{'images/s':>32}{'wall':>9}{'':8}{'cpu':>9}")
        for name, found in times.items():
            rates = [n / statistics.median(column) for column in zip(*found, strict=True)]
            first = first or rates
            line = "".join(f"{r:9.0f} {r / f:5.2f} ×" for r, f in zip(rates, first, strict=True))
            print(f"{name:>32}{line}")


if __name__ == "__main__":
    main()
