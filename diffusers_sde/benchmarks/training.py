"""``diffusers-sde bench --training``: time and memory of a training step against diffusers' example loop.

Knows both loops around the same network, batch and images, and the bare step that neither can do without.  Each loop
runs in an interpreter of its own, in turn; prints a table, asserts nothing.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.benchmarks.common import print_table
from diffusers_sde.training.networks import default_network

RESOLUTION, BATCH, IMAGES = 32, 16, 256
LOOPS = ("bare step", "diffusers' loop", "diffusers_sde.train")
RATE = 1e-4


def measure(steps: int = 12, repeats: int = 3) -> None:
    """Median milliseconds of a step over ``repeats`` interpreters of ``steps`` steps for each loop, interleaved, and
    the largest resident memory of any of them."""
    times: dict[str, list[float]] = {name: [] for name in LOOPS}
    overheads: dict[str, list[float]] = {name: [] for name in LOOPS}
    memory: dict[str, float] = dict.fromkeys(LOOPS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder))
        jobs = [name for _ in range(repeats) for name in LOOPS]
        for name in tqdm(jobs, desc="training", leave=False):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, network, peak = pool.apply(run_loop, (name, folder, steps))
            times[name] += seconds
            overheads[name] += [1 - n / s for n, s in zip(network, seconds, strict=True)]
            memory[name] = max(memory[name], peak)
    bare = statistics.median(times["bare step"])
    rows = []
    for name in LOOPS:
        median = statistics.median(times[name])
        share = f"{100 * statistics.median(overheads[name]):.1f} %"
        rows.append([name, f"{median * 1e3:.0f}", f"{median / bare:.3f}", share, f"{memory[name]:.0f}"])
    size = f"{RESOLUTION}x{RESOLUTION}, batch {BATCH}"
    title = f"A training step, {size}, default network, {torch.get_num_threads()} threads"
    print_table(title, ["loop", "ms", "x bare", "outside network and optimizer", "peak MB"], rows)


def make_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for i in range(IMAGES):
        pixels = draw.integers(0, 256, (RESOLUTION, RESOLUTION, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def run_loop(name: str, folder: str, steps: int) -> tuple[list[float], list[float], float]:
    """Seconds of each step, seconds of it in network and optimizer, and the peak memory in MB; two steps warm up."""
    torch.manual_seed(0)
    step, spent = {"bare step": bare_step, "diffusers' loop": diffusers_step, "diffusers_sde.train": our_step}[name](
        folder
    )
    seconds, inner = [], []
    for _ in range(steps + 2):
        spent.clear()
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        inner.append(sum(spent))
    return seconds[2:], inner[2:], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextlib.contextmanager
def clocked(spent: list[float]) -> Any:
    start = time.perf_counter()
    yield
    spent.append(time.perf_counter() - start)


Step = tuple[Callable[[], None], list[float]]


def bare_step(folder: str) -> Step:
    """Forward, backward, clipping and AdamW on one fixed batch."""
    network, spent = default_network(RESOLUTION, 3, 0).train(), []  # type: ignore[var-annotated]
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, fused=True)
    x, target = torch.randn(2, BATCH, 3, RESOLUTION, RESOLUTION)
    t = torch.randint(1000, (BATCH,))

    def step() -> None:
        with clocked(spent):
            loss = torch.nn.functional.mse_loss(network(x, t, return_dict=False)[0], target)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step, spent


def diffusers_step(folder: str) -> Step:
    """The steps of diffusers' unconditional training example: images decoded and transformed as they are needed, noise
    and times drawn for the batch, the scheduler's ``add_noise``, Accelerate, ``EMAModel``."""
    import diffusers
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    accelerator, spent = Accelerator(cpu=True), []  # type: ignore[var-annotated]
    network = default_network(RESOLUTION, 3, 0).train()
    ema = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    scheduler = diffusers.DDPMScheduler()
    files = sorted(Path(folder).glob("*.png"))

    class Folder(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> torch.Tensor:
            with Image.open(files[i]) as image:
                resized = image.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.array(resized)).movedim(-1, 0).float().div(127.5).sub(1)

    loader = torch.utils.data.DataLoader(Folder(), batch_size=BATCH, shuffle=True)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    batches = (batch for _ in range(1000) for batch in loader)

    def step() -> None:
        clean = next(batches)
        noise = torch.randn(clean.shape)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (len(clean),))
        noisy = scheduler.add_noise(clean, noise, times)
        with accelerator.accumulate(network):
            with clocked(spent):
                predicted = network(noisy, times).sample
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            with clocked(spent):
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        ema.step(network.parameters())
        loss.detach().item()

    return step, spent


def our_step(folder: str) -> Step:
    """``optimizer_step`` of the training script with its own data, noise, average and checks."""
    from accelerate import Accelerator

    from diffusers_sde.training.arguments import read_settings
    from diffusers_sde.training.loop import StopRequest, optimizer_step
    from diffusers_sde.training.losses import make_loss
    from diffusers_sde.training.plan import build_task, training_length
    from diffusers_sde.training.session import prepare

    spent: list[float] = []
    output = tempfile.mkdtemp()
    words = f"--train_data_dir {folder} --output_dir {output} --resolution {RESOLUTION} --train_batch_size {BATCH}"
    settings = read_settings(
        [*words.split(), *f"--use_ema --max_train_steps 10000 --learning_rate {RATE} --report_to none".split()]
    )
    accelerator = Accelerator(cpu=True)
    with contextlib.redirect_stdout(io.StringIO()):
        task, images, classes = build_task(settings)
    length = training_length(settings, images, 1)
    session, stream = prepare(settings, accelerator, task, images, classes, length, None)
    loss_of = make_loss(settings, task, None, length.global_batch)
    for owner, method in ((task.network, "forward"), (accelerator, "backward"), (session.optimizer, "step")):
        setattr(owner, method, _timed(getattr(owner, method), spent))
    accelerator.clip_grad_norm_ = _timed(accelerator.clip_grad_norm_, spent)
    stop = StopRequest()
    return lambda: optimizer_step(session, stream, loss_of, stop) and None, spent


def _timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with clocked(spent):
            return function(*args, **kwargs)

    return timed
