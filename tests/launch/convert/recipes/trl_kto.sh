accelerate launch --num_processes 4 trl/scripts/kto.py \
  --dataset_name trl-lib/kto-mix-14k --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
  --per_device_train_batch_size 16 --num_train_epochs 1 --learning_rate 5e-6 \
  --lr_scheduler_type cosine --gradient_accumulation_steps 1 --eval_steps 500 --eval_strategy steps \
  --output_dir kto-aligned-model --warmup_steps 0.1 --logging_first_step \
  --use_peft --load_in_4bit --lora_target_modules all-linear --lora_r 16 --lora_alpha 16
