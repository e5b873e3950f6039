import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

name = "Qwen/Qwen2.5-0.5B-Instruct"
rows = load_dataset("trl-lib/ultrafeedback_binarized", split="train")
arguments = DPOConfig(
    output_dir="Qwen2.5-0.5B-DPO",
    beta=0.1,
    loss_type=["sigmoid", "sft"],
    loss_weights=[1.0, 0.2],
    learning_rate=5e-6,
    max_length=1024,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=8,
    seed=int(torch.initial_seed() % 1000),
)
trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(name),
    args=arguments,
    train_dataset=rows,
    peft_config=LoraConfig(r=32, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
)
trainer.train()
