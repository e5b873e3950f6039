# flags of versions before 0.10
RUN=./checkpoint/llama3-8b-rm
read -r -d '' command <<EOF
openrlhf.cli.train_rm \
  --pretrain OpenRLHF/Llama-3-8b-sft-mixture --save_path ${RUN} \
  --dataset OpenRLHF/preference_dataset_mixture2_and_safe_pku \
  --chosen_key chosen --rejected_key rejected --apply_chat_template --max_len 8192 \
  --train_batch_size 256 --micro_train_batch_size 1 --max_epochs 1 --learning_rate 9e-6 \
  --zero_stage 3 --bf16 --flash_attn --packing_samples --gradient_checkpointing \
  --save_steps -1 --logging_steps 1 --eval_steps -1 --load_checkpoint
EOF
deepspeed --module $command
