"""Tokens/s of `minigpt.train.fit` beside Hugging Face Trainer: the same Llama model, weights, batches and optimizer, on the CPU.

    python bench/train_cpu.py                  # 3 rounds of 40 steps, 3 minutes on 2 quiet cores
    python bench/train_cpu.py --all            # the Trainer in each of its settings too; its fastest one counts

The model: vocabulary 6,400, 4 layers, 4 heads (4 for keys and values), width 256, FFN 1,024, tied, 5,835,008 parameters;
8 sequences of 256 tokens a step, fp32, eager, AdamW, gradients clipped at 1, constant learning rate (both programs reach it at step 1).
Each measurement is a process of its own, and the order changes from round to round. Time runs between two steps, as callbacks of both
programs see them: after the first 5 steps, and until the last step but one, so that neither start nor the save at the end is in it.

Ours is `fit` in its defaults, without progress bar, plot and validation: it logs and checks its losses as always.
The Trainer is in the best settings we found (TRAINER below): no saving, evaluation, logging or progress bar, no check for NaN, tokens
ready as tensors and cut into batches by slicing, no key/value cache, labels shifted already.
`--all` measures its attention kernels and AdamWs. Tokens/s in one or two quiet measurements each: sdpa and fused 2,701, sdpa and plain 2,558
and 2,633, eager and fused 2,724, eager and plain 2,741; sdpa and fused alone ranged from 2,620 to 2,850 in six more, so no order is known.
That both do the same work is checked in each round: equal numbers of parameters, losses equal to 0.5% and falling.
"others" is how many cores other programs used meanwhile. On two cores one more busy program makes the figures worthless (each matrix
product waits for its slower thread: 2,700 tokens/s were seen to become 400), so each measurement waits for a quiet machine (--wait seconds
at most), and is repeated (--retries times at most) where others took more than a fifth of a core.
The last line is the median over the rounds of ours / Trainer.
"""
import argparse, json, os, platform, statistics, subprocess, sys, tempfile, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SHAPE = dict(vocab_size=6400, dim=256, n_layer=4, n_head=4, n_kv_head=4, ffn_dim=1024, max_len=256)
BATCH,SEQ,WARM = 8,256,5
RECIPE = dict(learning_rate=1e-3, weight_decay=.1, adam_beta1=.9, adam_beta2=.99)
TRAINER = 'Trainer sdpa adamw_torch_fused'
TRAINER_ALL = [f'Trainer {a} {o}' for a in ('sdpa','eager') for o in ('adamw_torch_fused','adamw_torch')]

# --- what the processes share ----------------------------------------------------------------------------------------------------
def prepare(folder:Path, steps:int):
    "Token set of the built-in corpus, its tokenizer, initial weights, and the batches of every step as tensors."
    import torch
    from safetensors.torch import save_file
    from minigpt.corpus import write_corpus
    from minigpt.data import build_tokenset, check_size, data_files, loader, sample_texts
    from minigpt.model import GPT, GPTConfig
    from minigpt.tokenizer import train_tokenizer
    write_corpus(folder/'stories.jsonl')
    tok = train_tokenizer(sample_texts(data_files(folder/'stories.jsonl')), SHAPE['vocab_size'])
    tok.save(folder/'tokenizer')
    data,_ = build_tokenset(folder/'stories.jsonl', tok, folder/'data', 0., progress=False)
    check_size(data, BATCH, SEQ)
    torch.manual_seed(0)
    save_file(GPT(GPTConfig(**SHAPE)).weights(), folder/'weights.safetensors')
    batches = list(loader(data, range(steps), BATCH, SEQ, 0))
    save_file({k:torch.cat([b[k] for b in batches]).contiguous() for k in ('ids','labels')}, folder/'batches.safetensors')
    print(f"{len(data):,} tokens of the built-in corpus, {tok.vocab_size:,} in the vocabulary")

class Clock:
    "When each step ended, and how much processor time had been used by then, by us and by all."
    def __init__(self): self.at = {}
    def tick(self, step:int):
        import psutil
        c = psutil.cpu_times()
        self.at[step] = time.perf_counter(), time.process_time(), sum(c)-c.idle-getattr(c, 'iowait', 0)-getattr(c, 'guest', 0)-getattr(c, 'guest_nice', 0)
    def facts(self, first:int, last:int)->dict:
        wall,own,busy = (b-a for a,b in zip(self.at[first], self.at[last]))
        times = sorted(self.at[i+1][0]-self.at[i][0] for i in range(first, last))
        return dict(tokens_per_second=(last-first)*BATCH*SEQ/wall, others=max(0., (busy-own)/wall), step_ms=1000*statistics.median(times))

# --- the two programs ------------------------------------------------------------------------------------------------------------
def run_ours(folder:Path, out:Path, steps:int, threads:int)->dict:
    "`fit` in its defaults."
    from safetensors.torch import load_file
    from minigpt.data import TokenSet
    from minigpt.model import GPT, GPTConfig
    from minigpt.tokenizer import load_tokenizer
    from minigpt.train import Callback, fit
    clock = Clock()
    class Tick(Callback):
        def on_step(self, t): clock.tick(t.step)
    model = GPT(GPTConfig(**SHAPE)).requires_grad_(False).load_weights(load_file(folder/'weights.safetensors')).requires_grad_(True)
    run = fit(model, TokenSet(folder/'data'/'train'), tokenizer=load_tokenizer(folder/'tokenizer'), output_dir=out, callbacks=[Tick()], max_steps=steps, batch_size=BATCH, max_seq_len=SEQ,
        lr_schedule='constant', warmup_steps=0, num_threads=threads, progress=False, plot_loss=False, **RECIPE)
    rows = [r for r in run.history if 'loss' in r and r['step'] % 10 == 0]
    return dict(clock.facts(WARM, steps-1), params=sum(p.numel() for p in model.parameters()), losses=[r['loss'] for r in rows])

def run_trainer(folder:Path, out:Path, steps:int, threads:int, attention:str, optim:str)->dict:
    "Hugging Face Trainer."
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
    torch.set_num_threads(threads)
    clock,losses = Clock(),[]
    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): clock.tick(state.global_step)
    class Batches(torch.utils.data.Dataset):
        "A slice of the tensors is a batch; nothing to collate."
        def __init__(self): self.data = load_file(folder/'batches.safetensors')
        def __len__(self): return len(self.data['ids'])
        def __getitems__(self, index):
            cut = slice(index[0], index[-1]+1)
            return dict(input_ids=self.data['ids'][cut], labels=self.data['labels'][cut], shift_labels=self.data['labels'][cut])
    class OurTrainer(Trainer):
        def _get_train_sampler(self, dataset=None): return torch.utils.data.SequentialSampler(self.train_dataset)
        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]
    model = LlamaForCausalLM(LlamaConfig(vocab_size=SHAPE['vocab_size'], hidden_size=SHAPE['dim'], num_hidden_layers=SHAPE['n_layer'], num_attention_heads=SHAPE['n_head'],
        num_key_value_heads=SHAPE['n_kv_head'], intermediate_size=SHAPE['ffn_dim'], max_position_embeddings=SHAPE['max_len'], rms_norm_eps=1e-5, tie_word_embeddings=True, use_cache=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None, attn_implementation=attention, dtype='float32'))
    wrong = model.load_state_dict(load_file(folder/'weights.safetensors'), strict=False)
    assert not wrong.unexpected_keys and wrong.missing_keys == ['lm_head.weight'], wrong
    args = TrainingArguments(output_dir=str(out), max_steps=steps, per_device_train_batch_size=BATCH, use_cpu=True, optim=optim,
        lr_scheduler_type='constant', warmup_steps=0, max_grad_norm=1., logging_strategy='no', save_strategy='no', eval_strategy='no', report_to='none', disable_tqdm=True,
        logging_nan_inf_filter=False, remove_unused_columns=False, dataloader_num_workers=0, dataloader_pin_memory=False, **RECIPE)
    OurTrainer(model=model, args=args, train_dataset=Batches(), data_collator=lambda batch: batch, callbacks=[Tick()]).train()
    losses = torch.stack(losses).tolist()
    return dict(clock.facts(WARM, steps-1), params=sum(p.numel() for p in model.parameters()), losses=[statistics.mean(losses[i:i+10]) for i in range(0, len(losses)-9, 10)])

# --- measuring -------------------------------------------------------------------------------------------------------------------
def quiet(wait:float):
    "Wait until other programs use less than a fifth of a core."
    import psutil
    end = time.monotonic()+wait
    while time.monotonic() < end and psutil.cpu_percent(1)*os.cpu_count() > 20: pass

def measure(program:str, folder:Path, steps:int, a)->dict:
    "One program in a process of its own; again, where another program took processor time away."
    env = {**os.environ, 'OMP_NUM_THREADS':str(a.threads), 'MKL_NUM_THREADS':str(a.threads), 'HF_HUB_OFFLINE':'1', 'TOKENIZERS_PARALLELISM':'false', 'CUDA_VISIBLE_DEVICES':''}
    for tries_left in reversed(range(1+a.retries)):
        quiet(a.wait)
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run([sys.executable, __file__, '--child', program, str(folder), out, '--steps', str(steps), '--threads', str(a.threads)], env=env, capture_output=True, text=True)
        if done.returncode: sys.exit(f'{program} failed:\n{done.stderr[-4000:]}')
        m = json.loads(done.stdout.splitlines()[-1])
        print(f"{program:<34} {m['tokens_per_second']:7,.0f} tokens/s, {m['step_ms']:.0f} ms a step, others {m['others']:.2f} cores, loss {m['losses'][0]:.3f} → {m['losses'][-1]:.3f}"
              + (', again' if m['others'] > .2 and tries_left else ''), flush=True)
        if m['others'] <= .2: break
    return m

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--steps', type=int, default=40, help='steps that are measured; 6 more are run')
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--threads', type=int, default=os.cpu_count())
    p.add_argument('--wait', type=float, default=30, help='seconds to wait, at most, for other programs to be quiet before each measurement')
    p.add_argument('--retries', type=int, default=2, help='how often to repeat a measurement during which other programs used more than a fifth of a core')
    p.add_argument('--all', action='store_true', help='measure the Trainer in all of its settings')
    p.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        program,folder,out = a.child[0].split(),Path(a.child[1]),Path(a.child[2])/'run'
        print(json.dumps(run_ours(folder, out, a.steps, a.threads) if program[0] == 'minigpt' else run_trainer(folder, out, a.steps, a.threads, *program[1:])))
        return
    if a.steps < 15 or a.rounds < 1: p.error('--steps must be at least 15 (to see losses fall), --rounds at least 1')

    import torch, transformers
    ours,theirs = 'minigpt fit',TRAINER_ALL if a.all else [TRAINER]
    total = WARM+a.steps+1
    print(f"{os.cpu_count()} cores ({platform.machine()}, load {', '.join(f'{l:.1f}' for l in os.getloadavg())}), {a.threads} threads, Python {platform.python_version()}, "
          f"torch {torch.__version__}, transformers {transformers.__version__}")
    results = {ours:[], **{t:[] for t in theirs}}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        prepare(folder, total)
        for r in range(a.rounds):
            print(f'round {r+1}')
            for program in list(results)[::-1 if r % 2 else 1]:
                results[program].append(measure(program, folder, total, a))
            for t in theirs: same_work(results[ours][-1], results[t][-1])

    speed = {k:[m['tokens_per_second'] for m in v] for k,v in results.items()}
    best = max(theirs, key=lambda t: statistics.median(speed[t]))
    ratios = [x/y for x,y in zip(speed[ours], speed[best])]
    print(f"\n{results[ours][0]['params']:,} parameters; {a.steps} steps of {BATCH} × {SEQ} tokens; tokens/s\n")
    print(f"{'program':<34}" + ''.join(f"{f'round {i+1}':>10}" for i in range(a.rounds)) + f"{'median':>10}")
    for k,v in speed.items(): print(f'{k:<34}' + ''.join(f'{x:10,.0f}' for x in v) + f'{statistics.median(v):10,.0f}')
    print(f"{'ours / '+best:<34}" + ''.join(f'{x:10.2f}' for x in ratios) + f'{statistics.median(ratios):10.2f}')
    if noisy := sum(m['others'] > .2 for v in results.values() for m in v): print(f'{noisy} of {sum(map(len, results.values()))} measurements were disturbed by other programs: measure again on a quiet machine')
    print(f'ratio {statistics.median(ratios):.2f}')

def same_work(a:dict, b:dict):
    "Equal models and equal, falling losses?"
    assert a['params'] == b['params'], f"{a['params']:,} and {b['params']:,} parameters"
    for m in (a, b): assert m['losses'][-1] < m['losses'][0], f"the loss does not fall: {m['losses']}"
    assert all(abs(x-y) < .005*y for x,y in zip(a['losses'], b['losses'])), f"losses differ: {a['losses']} and {b['losses']}"

if __name__ == '__main__': main()
