"""A PyTorch tenant driven by the board: worker.py KIND SLOT BOARD. kernels.cu has the other kinds.

  gemm   8192^3 bf16 matrix products, back to back
  train  steps of a 12-layer transformer, bf16 autocast, AdamW
  serve  ResNet-50 fp16 batch 4 replayed as a CUDA graph, open loop, 100 requests a second: latency from the moment a
         request was due. Run word 3: back to back instead, which tells how much of the GPU one request takes.
"""
import sys
import time

from board import Slot


def transformer(torch):
    width, layers, batch, length = 768, 12, 16, 512
    layer = torch.nn.TransformerEncoderLayer(width, 12, 4 * width, batch_first=True, dropout=0.0, norm_first=True)
    model = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x = torch.randn(batch, length, width, device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = model(x)
            loss = (y * y).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def gemm(torch):
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    b, c = torch.randn_like(a), torch.empty_like(a)
    return lambda: torch.mm(a, b, out=c)


def resnet50(torch):
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, middle, stride):
            super().__init__()
            outputs = middle * 4
            self.path = nn.Sequential(
                nn.Conv2d(inputs, middle, 1, bias=False),
                nn.BatchNorm2d(middle),
                nn.ReLU(True),
                nn.Conv2d(middle, middle, 3, stride, 1, bias=False),
                nn.BatchNorm2d(middle),
                nn.ReLU(True),
                nn.Conv2d(middle, outputs, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            same = stride == 1 and inputs == outputs
            self.skip = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            )

        def forward(self, x):
            return torch.relu_(self.path(x) + self.skip(x))

    parts = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(True), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for stage, (middle, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        for block in range(blocks):
            parts.append(Block(inputs, middle, 2 if block == 0 and stage else 1))
            inputs = middle * 4
    model = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))
    model = model.to("cuda").half().eval().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 224, 224, device="cuda").half().to(memory_format=torch.channels_last)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(5):
                model(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
    return graph.replay


def main():
    kind, slot = sys.argv[1], Slot(sys.argv[3], int(sys.argv[2]))
    import torch

    torch.manual_seed(0)
    step = {"gemm": gemm, "train": transformer, "serve": resnet50}[kind](torch)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    slot.ready()
    ahead = {"gemm": 4, "train": 2, "serve": 4}[kind]
    flight, done, due = [], 0, None
    while True:
        run = slot.run()
        if run == 2:
            return
        if run == 0:
            while flight:
                flight.pop(0).synchronize()
                done += 1
                slot.push(time.monotonic(), done)
            due = None
            time.sleep(0.002)
        elif kind == "serve" and run == 1:
            flight.clear()
            due = (due or time.monotonic()) + 0.01
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            step()
            torch.cuda.synchronize()
            end = time.monotonic()
            slot.push(end, end - due)
        else:
            event = torch.cuda.Event()
            step()
            event.record()
            flight.append(event)
            while len(flight) > ahead:
                flight.pop(0).synchronize()
                done += 1
                slot.push(time.monotonic(), done)


if __name__ == "__main__":
    main()
