deepspeed --module openrlhf.cli.train_sft \
  --model.model_name_or_path mistralai/Mixtral-8x7B-v0.1 --model.aux_loss_coef 0.001 \
  --model.gradient_checkpointing_enable \
  --data.dataset Open-Orca/OpenOrca --data.input_key question --data.output_key response \
  --data.max_len 2048 --data.max_samples 500000 \
  --train.batch_size 128 --train.micro_batch_size 4 --train.max_epochs 1 --adam.lr 5e-6 \
  --ds.lora.rank 64 --ds.lora.alpha 64 --ds.zero_stage 3 --ds.param_dtype bf16 \
  --ds.packing_samples --ds.attn_implementation flash_attention_2 \
  --ckpt.output_dir ./checkpoint/mixtral-sft-lora --ckpt.save_steps -1 --logger.logging_steps 1 --eval.steps -1
