"""refq4 under the libraries people load and fine-tune models with. The core imports none of this.

    transformers.py   from_pretrained(..., quantization_config=Refq4Config(...)), save_pretrained, bitsandbytes' files
    peft.py           LoRA on refq4's layers, merged and unmerged

Importing one of the two is all it takes; each imports the library it is named after.
"""
