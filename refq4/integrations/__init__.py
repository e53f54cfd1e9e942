"""refq4 in the libraries with which people load and fine-tune models. The core imports none of these files.

    transformers.py     from_pretrained(..., quantization_config=Refq4Config(...)), save_pretrained, bitsandbytes' files
    methods.py          two methods of its models
    peft.py             adapters on refq4's layers, merged and unmerged
    peft_others.py      what methods besides LoRA need for that
    peft_experts.py     LoRA on fused experts
    experts.py          transformers' mixtures of experts on packed weights
    expert_files.py     how these are loaded and saved
    tensor_parallel.py  weights that are divided among processes (parts.py) under torch's parallelize_module
    parallel_plans.py   the same under the plans of transformers' models
    peft_parallel.py    LoRA on these
    later.py            peft.py by itself, for a model that refq4 has quantised
    in_memory.py        save_pretrained for a model that refq4.quantize_model has quantised

Import transformers.py or peft.py to use it; each imports the library of its name.
"""
