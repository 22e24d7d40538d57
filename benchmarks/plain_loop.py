"""python benchmarks/plain_loop.py --data Dataset --out runs/plain

The U-Net in the loop that PyTorch's tutorials write: float32, contiguous tensors, `torch.optim.Adam`, `loss.item()`,
two loader workers. Data, split, order of the images, augmentation, loss and early stopping are those of unet/train.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from unet.train import Config as UNetConfig
from utils.config import flag, parse

WORKERS = 2


@dataclass
class Config(UNetConfig):
    """The flags of unet/train.py; those about speed have no effect here."""

    out: Path = flag(Path("runs/plain"), "folder for best.pt")


def main() -> None:
    config = parse(Config, __doc__)

    import torch

    from dataset.pet import make_train_sets
    from unet.model import UNet
    from utils.loader import EpochBatchSampler, make_loader
    from utils.loss import SegmentationLoss
    from utils.metric import ConfusionMatrix, nan_mean
    from utils.run import seed_everything
    from utils.train import EarlyStopping

    seed_everything(config.seed)
    train_set, val_set = make_train_sets(config)
    samplers = [EpochBatchSampler(len(part), config.batch_size, shuffle=part is train_set, seed=config.seed)
                for part in (train_set, val_set)]  # fmt: skip
    device = torch.device("cpu")
    train_loader, val_loader = (make_loader(*pair, WORKERS, device) for pair in zip((train_set, val_set), samplers))
    model, criterion = UNet(base_channels=config.base_channels), SegmentationLoss(config.loss, config.boundary)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    stopping, best = EarlyStopping(config.patience, config.min_delta), float("inf")
    config.out.mkdir(parents=True, exist_ok=True)
    for epoch in range(1, config.epochs + 1):
        train_loader.batch_sampler.set_epoch(epoch)
        model.train()
        running_loss = 0.0
        for batch in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(batch["image"] / 255), batch["mask"]).value
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        model.eval()
        confusion, total = ConfusionMatrix(val_set.class_table.names), 0.0
        with torch.no_grad():
            for batch in val_loader:
                logits = model(batch["image"] / 255)
                total += criterion(logits, batch["mask"]).value.item() * len(logits)
                confusion.update(logits.argmax(dim=1), batch["mask"])
        loss = total / len(val_set)
        if loss < best:
            best = loss
            torch.save(model.state_dict(), config.out / "best.pt")
        text = f"epoch {epoch}/{config.epochs}  train_loss {running_loss / len(train_loader):.4f}  val_loss {loss:.4f}"
        print(f"{text}  val_iou_mean {nan_mean(confusion.iou()):.3f}", file=sys.stderr, flush=True)
        stopping.update(loss)
        if stopping.should_stop:
            break


if __name__ == "__main__":
    main()
