"""Settings of all tests: one torch thread (the tensors are tiny, and two processes share the machine), no network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
