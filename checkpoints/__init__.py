"""Checkpoints: every form in which a teacher or a student is read, and in which it is handed on.

| form                          | content                                | knows its base |
|-------------------------------|----------------------------------------|----------------|
| FILE.pt                       | an adapter by train_grpo.py or         | yes            |
|                               | train_opd.py: plain tensors, settings  |                |
| a folder                      | a PEFT adapter, as Flow-GRPO and       | no             |
|                               | Flow-OPD release: adapter_config.json, |                |
|                               | adapter_model.safetensors              |                |
| ORG/NAME, on the hub          | such a folder, which is downloaded     | no             |
| FILE.safetensors with lora_A, | an adapter in the single file of       | no             |
| lora_B                        | load_lora_weights, in diffusers        |                |
| FILE.safetensors with         | a fine-tuned or merged whole, in       | -              |
| a transformer                 | Stability's native layout              |                |

Each form will do wherever a checkpoint is asked for (--teachers, --ckpts, --init). With
--teachers, TASK=PATH names the task of a checkpoint that does not know it.

In Python a checkpoint is a dict with "task" (or ""), "anchor" (whether it was trained as the
quality teacher of all tasks), and one of two things:

    an adapter: "r", "alpha", "tensors"     {layer.A (n, r, D), layer.B (n, D, r)}
    a whole:    "net"                       an MMDiT

A whole has the base's latents and text. One of another size than the base (SD3.5-Large for
SD3.5-Medium) can teach and be evaluated, but no student starts from it.

formats.py reads and writes the forms, cold_start.py merges teachers into a student, teachers.py
prepares a run's teachers, and `python -m checkpoints` converts.
"""
