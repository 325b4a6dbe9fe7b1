"""The process that support.runs.train_in_processes starts: train what the file describes that is its argument."""

import pickle
import sys
from pathlib import Path

import torch

from support.runs import train_stage

if __name__ == "__main__":
    torch.set_num_threads(1)
    config, how = pickle.loads(Path(sys.argv[1]).read_bytes())
    train_stage(config, **how)
