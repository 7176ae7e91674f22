"""Train the base of the tiny world: its VAE, its text encoder alone, then all but the VAE.

    python -m worlds.tiny_base                      # writes ckpt/tiny.safetensors
    python -m worlds.tiny_base --show world.png     # look at some training pictures
    torchrun --nproc_per_node=2 -m worlds.tiny_base # on two cores (set OMP_NUM_THREADS=1)

A run that was stopped goes on where it was when the same command is given again.
"""
import plumbing.help  # noqa: F401 -- first, as it answers --help before torch is imported

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import trange

from model import PREFIX, MMDiT, MMDiTConfig
from plumbing import cli, dist
from plumbing.files import write_tensors
from plumbing.folder import check_places, prepare
from plumbing.log import Log
from plumbing.state import resume, write_state
from plumbing.stop import Stop
from sampler import generator
from worlds.prompts import RELATIONS
from worlds.tiny import TinyText
from worlds.tiny_pictures import (
    COLORS,
    FONT,
    OPPOSITE,
    RGB,
    SHAPE_ROWS,
    SIDE,
    blot,
    corrupt,
    faithful,
    render,
)
from worlds.tiny_prompts import LENGTH, PLURALS, TASKS, VOCAB, draw_prompt
from worlds.vae import VAE

HEAD = 32                # width of an attention head


@dataclass
class Config:
    # --- files
    # The model file to write.
    out: str = "ckpt/tiny.safetensors"
    # Where the resumable state and the log live.
    folder: str = "runs/tiny"
    # Steps between resumable states.
    save_every: int = 500
    # Only write a grid of training pictures to this PNG.
    show: str = ""

    # --- model
    # Width of the MMDiT.
    width: int = 128
    # Depth of the MMDiT.
    depth: int = 4

    # --- training
    # Training pictures, rendered and encoded once.
    pool: int = 262144
    # Steps of the VAE.
    vae_steps: int = 2000
    # Steps of the text encoder alone.
    text_steps: int = 600
    # Steps of the base.
    steps: int = 12000
    # Pictures a step, over all ranks.
    batch: int = 128
    # Learning rate of AdamW: warm-up, then a cosine to zero.
    lr: float = 1e-3
    # Part of the captions that are replaced by "" (for guidance).
    dropout: float = 0.1
    # Seed of everything.
    seed: int = 0
    # auto, cuda, mps, cpu.
    device: str = "auto"


def lr_at(step, steps, lr):
    warm_up = min(1, step / 200)
    return lr * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def set_lr(opt, lr):
    for group in opt.param_groups:
        group["lr"] = lr


# ------------------------------------------------------------------ training pictures

# The shares of the tasks (in their order) and of GenEval's tags: what is hard comes more often.
SHARES = (0.6, 0.24, 0.08, 0.08)
TAG_SHARES = {"single_object": 0.5, "two_object": 1, "counting": 2, "colors": 0.5, "position": 5,
              "color_attr": 3}
# The share of pictures that have blots.
BLOTTED = 0.6


def training_prompt(rng):
    return draw_prompt(rng, rng.choice(TASKS, p=SHARES), "train", tags=TAG_SHARES)


def pictures(rng, n, corrupted=True):
    """n training examples: prompts and images (n, 3, 32, 32) in [0, 1]."""
    metas = [training_prompt(rng) for _ in range(n)]
    scenes = [faithful(rng, meta) for meta in metas]
    images = []
    for meta, scene in zip(metas, scenes):
        if corrupted:
            scene = corrupt(rng, scene, meta["task"])
        image = render(rng, scene)
        if corrupted and rng.random() < BLOTTED:
            blot(rng, image)
        images.append(image)
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return metas, images.float() / 255


def show_pictures(cfg):
    """Write a grid of 8 x 8 training pictures, and print their prompts."""
    metas, images = pictures(np.random.default_rng(cfg.seed), 64)
    grid = images.view(8, 8, 3, SIDE, SIDE).permute(0, 3, 1, 4, 2)
    grid = grid.reshape(8 * SIDE, 8 * SIDE, 3).mul(255).byte().numpy()
    Image.fromarray(grid).resize((1024, 1024), Image.NEAREST).save(cfg.show)
    print("\n".join(meta["prompt"] for meta in metas))


@torch.no_grad()
def make_pool(cfg, vae, rank, world_size, device):
    """Render and encode the training set once: prompts, and latents on the CPU.

    Every rank makes its own part.
    """
    prompts = []
    latents = []
    for i in trange(cfg.pool // world_size // 256, desc="pictures", disable=rank > 0):
        metas, images = pictures(np.random.default_rng((cfg.seed, 3, rank, i)), 256)
        prompts += [meta["prompt"] for meta in metas]
        latents.append(vae.encode(images.to(device) * 2 - 1).cpu())
    return prompts, torch.cat(latents)


# ------------------------------------------------------------------ the VAE


def vae_loss(vae, x):
    """Squared error of the autoencoded images x (B, 3, 32, 32) in [-1, 1], and a small KL."""
    mean, logvar = vae.encoder(x).chunk(2, dim=1)
    logvar = logvar.clamp(-10, 10)
    y = vae.decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    # The drawing covers 5% of a picture. Its pixels weigh 10 times as much as the background's,
    # because otherwise the VAE would learn only the background.
    paper = x.flatten(2).median(2).values[..., None, None]
    drawn = (x - paper).abs().amax(1, keepdim=True) > 0.05
    error = ((1 + 9 * drawn) * (y - x) ** 2).mean()
    kl = 0.5 * (mean ** 2 + logvar.exp() - 1 - logvar).mean()
    return error + 4e-4 * kl


def average_gradients(parameters):
    """Average gradients over the ranks, in place."""
    flat = dist.sync_mean(torch.cat([p.grad.flatten() for p in parameters]))
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad.copy_(grad.view_as(p))


@torch.no_grad()
def fold_scale(vae, x):
    """Fold the mean and the spread of latents into the weights, so that SD3's constants fit.

    raw' = (raw - m) / (s * scale) + shift has the mean and the spread that VAE.encode undoes.
    x: images (B, 3, 32, 32) in [-1, 1], to measure m and s on.
    """
    raw = vae.encoder(x).chunk(2, dim=1)[0]
    m = raw.mean((0, 2, 3))
    gain = 1 / (raw.std((0, 2, 3)) * vae.scale)
    z = len(m)
    out = vae.encoder.conv_out
    out.weight[:z] *= gain.view(-1, 1, 1, 1)
    out.bias[:z] = (out.bias[:z] - m) * gain + vae.shift
    out.bias[z:] += 2 * gain.log()
    # The decoder's first convolution must see (raw' - shift) / gain + m. Its padding is raw' = 0.
    # So the fold is exact inside, and inexact only on the rim.
    into = vae.decoder.conv_in
    into.bias += torch.einsum("ozhw,z->o", into.weight, m - vae.shift / gain)
    into.weight /= gain.view(1, -1, 1, 1)


def train_vae(vae, cfg, rank, world_size, device):
    parameters = list(vae.parameters())
    opt = torch.optim.AdamW(parameters, betas=(0.9, 0.99))
    bar = trange(cfg.vae_steps, desc="VAE", disable=rank > 0)
    for step in bar:
        rng = np.random.default_rng((cfg.seed, 1, step, rank))
        _, images = pictures(rng, cfg.batch // world_size)
        loss = vae_loss(vae, images.to(device) * 2 - 1)
        set_lr(opt, 4 * lr_at(step, cfg.vae_steps, cfg.lr))
        opt.zero_grad()
        loss.backward()
        average_gradients(parameters)
        dist.clip_gradients(parameters)
        opt.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")


def make_vae(cfg, state, rank, world_size, device):
    """The VAE of the stopped run if there is one, or else a VAE that is trained now."""
    vae = VAE(ch=(8, 16, 32), n_res=1, z=4).to(device)
    if state:
        vae.load_state_dict(state["vae"])
    else:
        train_vae(vae, cfg, rank, world_size, device)
        _, images = pictures(np.random.default_rng((cfg.seed, 2)), 1024)
        fold_scale(vae, images.to(device) * 2 - 1)
    return vae.eval().requires_grad_(False)


# ------------------------------------------------------------------ the text encoder alone

# A figure's word is told apart by its side of the picture, its colour and its count.
ROLES = (1 + len(RELATIONS), 1 + len(COLORS), 5)
NOT_A_FIGURE = -100      # what F.cross_entropy ignores


def roles(meta, words):
    """What each word of a prompt means in it: (len(words), 3) classes, 0 where nothing is said.

    words: the prompt's words, in order. The classes are the side of the picture on which the
    figure lies, its colour and its count. Words that name no figure have NOT_A_FIGURE.
    """
    table = torch.full((len(words), len(ROLES)), NOT_A_FIGURE)
    side = {}
    include = meta.get("include", [])
    for i, clause in enumerate(include):
        if "position" in clause:
            relation, other = clause["position"]
            side[i] = 1 + RELATIONS.index(relation)
            side[other] = 1 + RELATIONS.index(OPPOSITE[relation])
    for i, clause in enumerate(include):
        name = clause["class"] if clause["count"] == 1 else PLURALS[clause["class"]]
        color = 1 + COLORS.index(clause["color"]) if "color" in clause else 0
        table[words.index(name)] = torch.tensor([side.get(i, 0), color, clause["count"]])
    return table


def roles_loss(text, head, metas):
    """Cross-entropy of the roles that head reads off the context, and the share read right."""
    prompts = [meta["prompt"] for meta in metas]
    tokens = text.tokens(prompts)
    words = [[VOCAB[i] for i in row] for row in tokens.tolist()]
    wanted = torch.stack([roles(meta, row) for meta, row in zip(metas, words)]).to(tokens.device)
    used = wanted[..., 0] != NOT_A_FIGURE
    wanted = wanted[used]                                                   # (figures, 3)
    context = text(prompts)[0]
    parts = head(context[used]).split(ROLES, dim=-1)
    # The layers should add what is needed and no more: a transformer may know the words as such.
    loss = 0.1 * (context - text.words(tokens)).pow(2).mean()
    for i, part in enumerate(parts):
        loss = loss + F.cross_entropy(part, wanted[:, i])
    read = torch.stack([part.argmax(-1) for part in parts], dim=-1)
    return loss, (read == wanted).all(-1).float().mean()


def teach_text(text, cfg, rank, world_size):
    """Teach the text encoder, on captions alone, what each figure's word means in its caption.

    SD3.5's text encoders come trained too. Without this the relation of two figures is not read:
    pictures alone give almost no gradient to it, as three facts must be known at once (which
    figure is named first, the relation, and which figure lies where).
    """
    head = torch.nn.Linear(text.place.shape[1], sum(ROLES)).to(text.place.device)
    learns = list(text.parameters()) + list(head.parameters())
    opt = torch.optim.AdamW(learns, betas=(0.9, 0.99))
    bar = trange(cfg.text_steps, desc="text", disable=rank > 0)
    for step in bar:
        rng = np.random.default_rng((cfg.seed, 4, step, rank))
        metas = [draw_prompt(rng, "geneval", "train", tags=TAG_SHARES)
                 for _ in range(cfg.batch // world_size)]
        loss, right = roles_loss(text, head, metas)
        set_lr(opt, 2 * lr_at(step, cfg.text_steps, cfg.lr))
        opt.zero_grad()
        loss.backward()
        for p in learns:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        average_gradients(learns)
        dist.clip_gradients(learns)
        opt.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", right=f"{right.item():.3f}")
    return head


# ------------------------------------------------------------------ the base


class Base(torch.nn.Module):
    """MMDiT and text encoder, trained together. forward gives the loss, so that DDP sees it all."""

    def __init__(self, cfg):
        super().__init__()
        self.text = TinyText(VOCAB, LENGTH, 64)
        self.mmdit = MMDiT(MMDiTConfig(
            depth=cfg.depth, width=cfg.width, head_dim=HEAD, channels=4, patch=2, pos_max=8,
            context_dim=64, pooled_dim=64, dual=cfg.depth // 2)).init_weights()

    def forward(self, x0, prompts, t, eps):
        """The flow matching loss. x0, eps (B, 4, 8, 8), t (B,), B prompts."""
        context, pooled = self.text(prompts)
        t_wide = t.view(-1, 1, 1, 1)
        x = (1 - t_wide) * x0 + t_wide * eps                    # x_t = (1 - t) x_0 + t eps
        v = self.mmdit(x, t, context, pooled)
        return F.mse_loss(v, eps - x0)                          # v = eps - x_0


def make_base(cfg, rank, world_size, device):
    """A new base, whose text encoder is taught."""
    torch.manual_seed(cfg.seed)
    base = Base(cfg).to(device)
    teach_text(base.text, cfg, rank, world_size)
    return base


def draw_batch(cfg, prompts, latents, rank, step, n):
    """The batch of one step, on the CPU: x0, captions, t and eps.

    The random numbers depend on seed, rank and step only, so a resumed run draws the same ones.
    """
    g = generator(cfg.seed, "base", rank, step)
    index = torch.randint(len(prompts), (n,), generator=g)
    kept = torch.rand(n, generator=g) >= cfg.dropout
    captions = []
    for i, keep in zip(index.tolist(), kept.tolist()):
        captions.append(prompts[i] if keep else "")
    # t is logit-normal (SD3), moved a little towards the noise (t = 1), where modes are chosen.
    t = torch.sigmoid(torch.randn(n, generator=g) + 0.5)
    x0 = latents[index]
    return x0, captions, t, torch.randn(x0.shape, generator=g)


def write_model(base, vae, path):
    """One safetensors file in half precision. The tensors have SD3.5's names."""
    tensors = {}
    for part, net in {"mmdit": base.mmdit, "vae": vae, "text": base.text}.items():
        for name, tensor in net.state_dict().items():
            tensors[PREFIX[part] + name] = tensor.half().cpu().contiguous()
    metadata = {"world": "tiny", "resolution": str(SIDE), "vocab": json.dumps(VOCAB)}
    write_tensors(path, tensors, metadata)


def run_settings(cfg, world_size):
    """What a resumed run must share with the stopped one."""
    settings = asdict(cfg)
    for name in ("out", "folder", "show"):
        del settings[name]
    settings["world_size"] = world_size
    settings["world"] = str((SHAPE_ROWS, RGB, FONT, VOCAB))
    return settings


def check(cfg, world_size):
    """ValueError for all that can be known to be wrong before any time is spent."""
    cli.positive(cfg, "save_every", "width", "depth", "pool", "vae_steps", "steps", "batch", "lr")
    if cfg.dropout >= 1:
        raise ValueError(f"--dropout {cfg.dropout}: a part of the captions; expected "
                         "0 <= dropout < 1")
    if cfg.width % HEAD:
        raise ValueError(f"--width {cfg.width}: expected a multiple of {HEAD}, the width of a head")
    if cfg.show and Path(cfg.show).suffix != ".png":
        raise ValueError(f"--show {cfg.show}: expected a name that ends in .png")
    check_places(cfg.folder, cfg.show or cfg.out)
    if cfg.batch % world_size or cfg.pool % (256 * world_size):
        raise ValueError(f"--batch {cfg.batch} and --pool {cfg.pool}: expected multiples of "
                         f"{world_size} and {256 * world_size} with {world_size} ranks")


def main(cfg):
    rank, world_size, device = dist.setup(cfg.device, cfg.seed)
    check(cfg, world_size)
    if cfg.show:
        show_pictures(cfg)
        return
    path = Path(cfg.folder) / "state.pt"
    settings = run_settings(cfg, world_size)
    prepare(Path(cfg.folder), cfg.out, rank)
    # VAE and base fit only this world. So the seed, the sizes and the world itself must be those of
    # the stopped run. The others may change.
    state = resume(path, settings, "tiny", free=["steps", "batch", "lr", "pool"]) or {}
    vae = make_vae(cfg, state, rank, world_size, device)
    fixed = {"settings": settings, "base": "tiny", "vae": vae.state_dict()}
    if rank == 0 and not state:
        write_state(path, {"iter": 0, **fixed})
    prompts, latents = make_pool(cfg, vae, rank, world_size, device)

    base = Base(cfg).to(device) if "weights" in state else make_base(cfg, rank, world_size, device)
    opt = torch.optim.AdamW(base.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    if "weights" in state:
        base.load_state_dict(state["weights"])
        opt.load_state_dict(state["opt"])
    first = state.get("iter", 0)
    ddp = dist.distribute(base, full=False)
    log = Log(cfg.folder, rank, asdict(cfg), first)
    losses = []
    start = time.time()
    stop = Stop()
    bar = trange(first, cfg.steps, initial=first, total=cfg.steps, desc="base", disable=rank > 0)
    for step in bar:
        n = cfg.batch // world_size
        x0, captions, t, eps = draw_batch(cfg, prompts, latents, rank, step, n)
        loss = ddp(x0.to(device), captions, t.to(device), eps.to(device))
        set_lr(opt, 2 * lr_at(step, cfg.steps, cfg.lr))
        opt.zero_grad()
        loss.backward()
        dist.clip_gradients(base.parameters())
        opt.step()
        losses.append(loss.item())
        done = step + 1
        stopping = stop.asked()
        if rank == 0 and (done % cfg.save_every == 0 or done == cfg.steps or stopping):
            speed = len(losses) * cfg.batch / (time.time() - start)
            log({"iter": done, "loss": float(np.mean(losses)), "images/s": speed})
            write_state(path, {"iter": done, **fixed, "weights": base.state_dict(),
                               "opt": opt.state_dict()})
            losses = []
            start = time.time()
        if stopping:
            stop.leave(done, path, rank)
    # A run that was killed between its last state and this file writes it now.
    if rank == 0:
        write_model(base, vae, cfg.out)


if __name__ == "__main__":
    cli.run(main, Config)
