"""The world of Stable Diffusion 3.5: its files, its text encoders, and the paper's tasks.

    stable-diffusion-3.5-medium/     the folder as published, or its name on the hub
        sd3.5_medium.safetensors     transformer and VAE, in Stability's native layout
        text_encoder/     text_encoder_2/     text_encoder_3/      CLIP-L, CLIP-G, T5-XXL
        tokenizer/        tokenizer_2/        tokenizer_3/

--model is the folder or the file. The text encoders are found beside the file, or in the folder
that --text-encoders names. SD3-Medium and SD3.5-Large are read in the same way.

T5 makes 128 tokens in Flow-GRPO and here, and 256 in the reference (`--t5 256`). `--t5 zeros`
leaves T5 out, and saves 10 GB to load. 256 zero vectors then replace its output, as in diffusers.

Sources: SD3 arXiv 2403.03206, Stability-AI/sd3.5; Flow-GRPO arXiv 2505.05470.
"""
import hashlib
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, CLIPTextModelWithProjection, T5EncoderModel
from transformers.utils import logging

import scorers
from model import load_mmdit, part_shapes
from plumbing.files import first_line, open_tensors, write_tensors
from scorers.geneval import COLORS, check_classes
from worlds import sd3_prompts
from worlds.paths import find
from worlds.prompts import TAGS, check_known
from worlds.vae import load_vae
from worlds.world import Model, World

CLIP_TOKENS = 77
# Embeddings of prompts: 1.4 MB each with 128 T5 tokens, 2.4 MB with 256.
CACHE = Path("runs/text")

# ------------------------------------------------------------------ text


class SD3Text:
    """CLIP-L, CLIP-G and T5-XXL. Their embeddings are kept on the disk.

    prepare(prompts) encodes the prompts that are not on the disk yet, and frees the encoders. A
    call reads from the disk. CLIP cuts a prompt off after 77 tokens, T5 after 128 or 256.

    context (B, 77 + T5 tokens, 4096): CLIP's two penultimate hidden states side by side
    (768 + 1280) and zeros, then T5's last one, without an attention mask.
    pooled (B, 2048): CLIP's two projected pooled vectors.
    """

    def __init__(self, folder, t5, device, dtype, file, cache=CACHE):
        """file: the model that the encoders are for; folder: where they are."""
        if t5 not in ("128", "256", "zeros"):
            raise ValueError(f"--t5 {t5}: expected 128 or 256 (tokens), or zeros (T5 left out)")
        self.folder = Path(folder)
        self.device = device
        self.dtype = dtype
        self.t5 = t5
        self.has_t5 = t5 != "zeros"
        self.tokens = int(t5) if self.has_t5 else 256
        # CLIP-L, CLIP-G, T5-XXL: how the names of their folders end.
        self.parts = ["", "_2", "_3"] if self.has_t5 else ["", "_2"]
        self.check_folder(file)
        self.cache = Path(cache) / self.identity()

    def check_folder(self, file):
        """Raise a ValueError that names the first missing file, if one is missing."""
        wanted = []
        for part in self.parts:
            wanted.append(f"tokenizer{part}/tokenizer_config.json")
            wanted.append(f"text_encoder{part}/config.json")
        missing = [name for name in wanted if not (self.folder / name).is_file()]
        if not missing:
            return
        hint = " (or leave T5 out: --t5 zeros)" if "_3/" in missing[0] else ""
        raise ValueError(f"--model {file}: for its text, {self.folder} has no {missing[0]}; "
                         "expected text_encoder*/ and tokenizer*/ of its published folder beside "
                         f"the file, or in the folder that --text-encoders names{hint}")

    def identity(self):
        """A name for what the embeddings depend on: encoders, tokenizers, T5's length, and dtype.

        Of each file it hashes the name, the size, and the first and last MiB.
        """
        digest = hashlib.sha256(f"{self.t5} {self.dtype}".encode())
        files = []
        for part in self.parts:
            files += (self.folder / f"tokenizer{part}").iterdir()
            files += (self.folder / f"text_encoder{part}").iterdir()
        for path in sorted(files):
            size = path.stat().st_size
            digest.update(f"{path.parent.name}/{path.name} {size}".encode())
            with open(path, "rb") as file:
                digest.update(file.read(2 ** 20))
                file.seek(max(0, size - 2 ** 20))
                digest.update(file.read())
        return digest.hexdigest()[:16]

    def fit(self, cfg):
        """ValueError unless these encoders make what the transformer reads."""
        configs = [AutoConfig.from_pretrained(self.folder / f"text_encoder{part}")
                   for part in self.parts]
        pooled = configs[0].projection_dim + configs[1].projection_dim
        context = configs[2].d_model if self.has_t5 else cfg.context_dim
        if (context, pooled) != (cfg.context_dim, cfg.pooled_dim):
            raise ValueError(f"{self.folder}: its text encoders give context {context} and pooled "
                             f"{pooled}, the transformer wants {cfg.context_dim} and "
                             f"{cfg.pooled_dim}")
        self.context_dim = cfg.context_dim

    def shape(self):
        """Tokens of a prompt, and numbers of a token."""
        return CLIP_TOKENS + self.tokens, self.context_dim

    # The networks

    def variant(self, part):
        """Which of an encoder's files are read: None, or "fp16" if there are no others."""
        folder = self.folder / f"text_encoder{part}"
        whole = ("model.safetensors", "model.safetensors.index.json")
        return None if any((folder / name).is_file() for name in whole) else "fp16"

    def size(self):
        """The bytes of the encoders in memory, while prepare() runs. They are not loaded for it."""
        numbers = 0
        for part in self.parts:
            for path in (self.folder / f"text_encoder{part}").glob("*.safetensors"):
                if (".fp16" in path.name) == (self.variant(part) == "fp16"):
                    with open_tensors(path, verify=False) as file:
                        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
                    numbers += sum(math.prod(shape) for shape in shapes)
        return numbers * self.dtype.itemsize

    def encoder(self, part):
        """Load one text encoder, strictly."""
        cls = T5EncoderModel if part == "_3" else CLIPTextModelWithProjection
        folder = self.folder / f"text_encoder{part}"
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            net, info = cls.from_pretrained(folder, dtype=self.dtype, variant=self.variant(part),
                                            output_loading_info=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{folder}: cannot be loaded: {first_line(error)}") from None
        finally:
            logging.set_verbosity(verbosity)
        for kind in ("missing", "mismatched"):
            names = sorted(str(name) for name in info[f"{kind}_keys"])
            if names:
                raise ValueError(f"{folder}: tensor '{names[0]}' is {kind}, "
                                 f"expected all of {cls.__name__}")
        return net.to(self.device).eval().requires_grad_(False)

    def encode(self, tokenizers, encoders, prompts):
        """prompts (B strings) -> {"clip": (B, 77, 768 + 1280), "pooled": (B, 768 + 1280)}.

        The dict also has "t5" (B, tokens, 4096), unless T5 is left out.
        """
        def ids(i, length):
            tokens = tokenizers[i](prompts, padding="max_length", max_length=length,
                                   truncation=True, return_tensors="pt")
            return tokens.input_ids.to(self.device)

        clip = [encoders[i](ids(i, CLIP_TOKENS), output_hidden_states=True) for i in (0, 1)]
        vectors = {"clip": torch.cat([out.hidden_states[-2] for out in clip], -1),
                   "pooled": torch.cat([out.text_embeds for out in clip], -1)}
        if self.has_t5:
            vectors["t5"] = encoders[2](ids(2, self.tokens)).last_hidden_state
        return vectors

    # The disk

    def file(self, prompt):
        name = hashlib.sha256(prompt.encode()).hexdigest()[:32]
        return self.cache / f"{name}.safetensors"

    def check_space(self, n, rank):
        """ValueError unless the embeddings of n prompts fit on the disk."""
        self.cache.mkdir(parents=True, exist_ok=True)
        size = n * CLIP_TOKENS * 4096
        if self.has_t5:
            size += n * self.tokens * 8192
        free = shutil.disk_usage(self.cache).free
        if size > free:
            raise ValueError(f"{self.cache}: the embeddings of about {n} prompts need "
                             f"{size / 1e9:.0f} GB, and {free / 1e9:.0f} GB are free; make room, "
                             "link runs/text to a larger disk, or lower --iters")
        if rank == 0 and size > 1e9:
            print(f"text: encoding about {n} prompts into {self.cache}, {size / 1e9:.0f} GB",
                  flush=True)

    @torch.no_grad()
    def prepare(self, prompts, rank=0, world_size=1, batch=16):
        """Encode this rank's share of the prompts and the empty prompt, and write it to the disk.

        Prompts that are on the disk already are skipped. The encoders are in memory only during
        this call.
        """
        # All prompts are shared out, done or not, so that every rank computes the same shares.
        share = list(dict.fromkeys([*prompts, ""]))[rank::world_size]
        todo = [prompt for prompt in share if not self.file(prompt).exists()]
        if not todo:
            return
        self.check_space(len(todo) * world_size, rank)
        tokenizers = [AutoTokenizer.from_pretrained(self.folder / f"tokenizer{part}")
                      for part in self.parts]
        encoders = [self.encoder(part) for part in self.parts]
        bar = tqdm(total=len(todo), desc="text", unit="prompt", disable=rank > 0)
        for start in range(0, len(todo), batch):
            chunk = todo[start:start + batch]
            vectors = self.encode(tokenizers, encoders, chunk)
            for i, prompt in enumerate(chunk):
                row = {name: x[i].contiguous().cpu() for name, x in vectors.items()}
                write_tensors(self.file(prompt), row)
            bar.update(len(chunk))
        bar.close()
        del encoders
        if torch.cuda.is_available():
            # This frees 11 GB for the policy, and for a judge on the same card.
            torch.cuda.empty_cache()

    def read(self, prompt):
        """One prompt from the disk -> context (77 + tokens, 4096), pooled (2048,)."""
        try:
            row = load_file(self.file(prompt), str(self.device))
        except SafetensorError as error:
            raise ValueError(f"{self.file(prompt)}: is damaged ({error}); delete it, and it will "
                             "be made again") from None
        clip = F.pad(row["clip"], (0, self.context_dim - row["clip"].shape[-1]))
        if self.has_t5:
            t5 = row["t5"]
        else:
            t5 = clip.new_zeros(self.tokens, self.context_dim)
        return torch.cat([clip, t5]), row["pooled"]

    def __call__(self, prompts):
        """prompts, a list of B strings -> context (B, 77 + tokens, 4096), pooled (B, 2048)."""
        self.prepare(prompts)
        contexts = []
        pooleds = []
        for prompt in prompts:
            context, pooled = self.read(prompt)
            contexts.append(context)
            pooleds.append(pooled)
        return torch.stack(contexts), torch.stack(pooleds)


# ------------------------------------------------------------------ the world


def check_size(size, cfg, factor):
    """ValueError unless the transformer can draw pictures of size pixels."""
    unit = factor * cfg.patch
    most = unit * cfg.pos_max
    if size % unit or not 0 < size <= most:
        raise ValueError(f"--size {size}: expected a multiple of {unit}, at most {most}")


class SD3(World):
    name = "sd3"
    tasks = ("geneval", "ocr", "pickscore", "quality")
    tags = TAGS
    lora = (32, 64.0)
    # The quality teacher anchors all prompts of stage 2, so quality needs no prompts of its own.
    ratio = {"geneval": 3, "ocr": 1, "pickscore": 1, "quality": 0}
    reward = {"geneval": "geneval", "ocr": "ocr", "pickscore": "pickscore",
              "quality": "deqa=0.4,pickscore=0.6"}
    judge = "deqa"
    score = {"geneval": "geneval_benchmark", "ocr": "ocr", "pickscore": "pickscore",
             "quality": "deqa"}

    def load(self, path, device="cpu", dtype=torch.float32, size=None, t5="", text_encoders=""):
        """The Model of SD3.5's file, folder or hub name.

        dtype: that of the transformer and the text encoders. The VAE is float32, as in Flow-GRPO.
        size: side of the images in pixels, 512 by default.
        t5: "128" (the default), "256" or "zeros".
        text_encoders: the folder of the text encoders, by default the folder of the file.
        """
        file = find(path, text_encoders=not text_encoders)
        # The cheap checks first.
        part_shapes(file, "mmdit", "joint_blocks.")
        part_shapes(file, "vae", "decoder.")
        folder = text_encoders or file.parent
        text = SD3Text(folder, t5 or "128", device, dtype, file)
        mmdit = load_mmdit(file, device, dtype)
        vae = load_vae(file, device)
        size = size or 512
        check_size(size, mmdit.cfg, vae.factor)
        text.fit(mmdit.cfg)
        return Model(mmdit, vae, text, size, str(file))

    def own_prompt(self, rng, task, split, tags=None):
        return sd3_prompts.draw_prompt(rng, task, split, tags)

    def detect(self, images, metas):
        return scorers.get("geneval.Detector", images.device)(images, metas)

    def read(self, images):
        return scorers.get("ocr.Reader", images.device)(images)

    def check_meta(self, meta):
        check_classes([meta])
        check_known(meta, meta["include"], "color", COLORS)
