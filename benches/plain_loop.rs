//! A decode loop without actors: the kernels of `exact` and `off`, called by threads that run the
//! whole token side by side and meet at spinning barriers. What the pipeline is compared with.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use pi_actors::slots::{Shared, SharedF32};
use pi_actors::weights::{
    Embedding, FfnShare, LayerShare, Matrix, ModelWeights, NeuronStore, UpRows,
};
use pi_kernels::attention::{
    CHUNK_POSITIONS, KvHead, KvType, Queries, append, attend_chunk, join_chunks, reset_states,
    state_len,
};
use pi_kernels::elementwise::{add_assign, relu_mul};
use pi_kernels::ffn_sparse::{
    FFN_GROUPS, GroupSpan, ask_for_down, down_active, gate_active, up_active,
};
use pi_kernels::gemm::gemv;
use pi_kernels::norm::rms_norm;
use pi_kernels::quant::BLOCK;
use pi_kernels::rope::RopeTable;
use pi_kernels::{ActBatch, Cpu, ROW_GROUP};

/// A barrier that only spins.
#[derive(Debug, Default)]
struct SpinBarrier {
    arrived: AtomicUsize,
    round: AtomicUsize,
}

impl SpinBarrier {
    fn wait(&self, n_threads: usize) {
        let round = self.round.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == n_threads {
            self.arrived.store(0, Ordering::Relaxed);
            self.round.store(round + 1, Ordering::Release);
            return;
        }
        while self.round.load(Ordering::Acquire) == round {
            std::hint::spin_loop();
        }
    }
}

/// Keys and values of a layer, `[2, n_head_kv, n_ctx, head_dim]` f16.
type Cache = Shared<Vec<u8>>;

/// Active neurons of one token.
type ActiveList = (Vec<u32>, Vec<f32>);

/// A model of one node, and the buffers of its loop.
pub struct PlainLoop<'a> {
    weights: &'a ModelWeights,
    cpu: Cpu,
    n_threads: usize,
    rope: RopeTable,
    barrier: SpinBarrier,
    caches: Vec<Cache>,
    x: SharedF32,
    rotation: SharedF32,
    q: SharedF32,
    k: SharedF32,
    v: SharedF32,
    heads: SharedF32,
    states: SharedF32,
    projected: SharedF32,
    gate: SharedF32,
    up: SharedF32,
    act: SharedF32,
    sum: SharedF32,
    logits: SharedF32,
    normed: Shared<ActBatch>,
    attn: Shared<ActBatch>,
    lists: Vec<Shared<ActiveList>>,
    /// All active neurons, each thread's own copy.
    all: Vec<Shared<ActiveList>>,
}

fn part(thread: usize, n_threads: usize, count: usize, multiple: usize) -> Range<usize> {
    let units = count.div_ceil(multiple);
    let bound = |thread: usize| (units * thread / n_threads * multiple).min(count);
    bound(thread)..bound(thread + 1)
}

impl<'a> PlainLoop<'a> {
    /// For a model that lies on one node, with a ReLU gate and neuron rows.
    pub fn new(weights: &'a ModelWeights, cpu: Cpu, n_threads: usize) -> Self {
        let shape = &weights.shape;
        let n_kv = shape.n_head_kv * shape.head_dim;
        let cache = || Shared::new(vec![0; 2 * KvType::F16.row_bytes(n_kv) * shape.n_ctx]);
        let rope = RopeTable::new(shape.rope.clone());
        let states =
            shape.n_head * shape.n_ctx.div_ceil(CHUNK_POSITIONS) * state_len(shape.head_dim);
        let list = || {
            Shared::new((
                Vec::with_capacity(shape.n_ff),
                Vec::with_capacity(shape.n_ff),
            ))
        };
        Self {
            weights,
            cpu,
            n_threads,
            barrier: SpinBarrier::default(),
            caches: (0..shape.n_layer).map(|_| cache()).collect(),
            x: SharedF32::new(shape.n_embd),
            rotation: SharedF32::new(rope.row_len()),
            rope,
            q: SharedF32::new(shape.n_attn()),
            k: SharedF32::new(n_kv),
            v: SharedF32::new(n_kv),
            heads: SharedF32::new(shape.n_attn()),
            states: SharedF32::new(states),
            projected: SharedF32::new(shape.n_embd),
            gate: SharedF32::new(shape.n_ff),
            up: SharedF32::new(shape.n_ff),
            act: SharedF32::new(shape.n_ff),
            sum: SharedF32::new(shape.n_embd),
            logits: SharedF32::new(shape.n_vocab),
            normed: Shared::new(ActBatch::new(cpu.mode(), shape.n_embd, 1)),
            attn: Shared::new(ActBatch::new(cpu.mode(), shape.n_attn(), 1)),
            lists: (0..n_threads).map(|_| list()).collect(),
            all: (0..n_threads).map(|_| list()).collect(),
        }
    }

    /// Feeds `tokens` from position 0 on one by one, on threads pinned to `cpus`; `after_token` is
    /// called on the first thread with the logits of each.
    pub fn run(&self, cpus: &[usize], tokens: &[u32], mut after_token: impl FnMut(&[f32]) + Send) {
        assert_eq!(cpus.len(), self.n_threads, "a CPU for each thread");
        std::thread::scope(|scope| {
            for (thread, &cpu) in cpus.iter().enumerate().skip(1) {
                scope.spawn(move || {
                    pi_topology::pin_thread(cpu).expect("the plan's CPUs are there");
                    for (position, &token) in tokens.iter().enumerate() {
                        self.token(thread, token, position);
                    }
                });
            }
            scope.spawn(|| {
                pi_topology::pin_thread(cpus[0]).expect("the plan's CPUs are there");
                for (position, &token) in tokens.iter().enumerate() {
                    self.token(0, token, position);
                    // SAFETY: the others wait at the next token's first barrier.
                    after_token(unsafe { self.logits.read(0..self.weights.shape.n_vocab) });
                }
            });
        });
    }

    fn meet(&self) {
        self.barrier.wait(self.n_threads);
    }

    /// One thread's part of a token.
    ///
    /// Between two barriers a buffer is either read only, or written in parts of the threads' own,
    /// or the first thread's alone: that is what makes every `unsafe` below sound.
    fn token(&self, thread: usize, token: u32, position: usize) {
        let shape = &self.weights.shape;
        if thread == 0 {
            // SAFETY: see above.
            unsafe {
                self.embed(token as usize);
                self.rope
                    .fill(position, self.rotation.write(0..self.rope.row_len()));
                self.norm(&self.weights.layers[0].attn_norm);
            }
        }
        self.meet();
        for (n, layer) in self.weights.layers.iter().enumerate() {
            let share = &layer.shares[0];
            // SAFETY: see above.
            unsafe {
                self.project(thread, share);
                self.meet();
                self.attention(thread, n, position);
                self.meet();
                if thread == 0 {
                    let heads = self.heads.read(0..shape.n_attn());
                    self.attn.get_mut().set(self.cpu, 0, heads);
                }
                self.meet();
                let rows = self.part(thread, shape.n_embd, ROW_GROUP);
                let out = self.projected.write(rows.clone());
                gemv(
                    self.cpu,
                    share.wo.view(),
                    self.attn.get().token(0),
                    rows,
                    out,
                );
                self.meet();
                if thread == 0 {
                    self.add(&self.projected);
                    self.norm(&layer.ffn_norm);
                }
                self.meet();
                self.ffn(thread, share);
                self.meet();
                if thread == 0 {
                    self.add(&self.sum);
                    let next = self.weights.layers.get(n + 1);
                    self.norm(next.map_or(&self.weights.output_norm, |next| &next.attn_norm));
                }
                self.meet();
            }
        }
        let rows = self.part(thread, shape.n_vocab, ROW_GROUP);
        // SAFETY: see above.
        unsafe {
            let out = self.logits.write(rows.clone());
            let head = &self.weights.head[0].matrix;
            gemv(self.cpu, head.view(), self.normed.get().token(0), rows, out);
        }
        self.meet();
    }

    fn part(&self, thread: usize, count: usize, multiple: usize) -> Range<usize> {
        part(thread, self.n_threads, count, multiple)
    }

    /// # Safety
    /// Nobody else touches `x`.
    unsafe fn embed(&self, token: usize) {
        let Embedding::Tied = self.weights.embedding else {
            unreachable!("the demo model's embedding is its head")
        };
        // SAFETY: this function's contract.
        let x = unsafe { self.x.write(0..self.weights.shape.n_embd) };
        self.weights.head[0].matrix.view().dequantize_row(token, x);
    }

    /// # Safety
    /// Nobody else touches `x` and `normed`.
    unsafe fn norm(&self, weight: &[f32]) {
        let shape = &self.weights.shape;
        // SAFETY: this function's contract.
        unsafe {
            let x = self.x.read(0..shape.n_embd);
            let normed = self.normed.get_mut();
            rms_norm(self.cpu, x, weight, shape.rms_eps, normed.values_mut(0));
            normed.prepare(self.cpu, 0);
        }
    }

    /// # Safety
    /// Nobody else touches `x`, and nobody writes `y`.
    unsafe fn add(&self, y: &SharedF32) {
        let n_embd = self.weights.shape.n_embd;
        // SAFETY: this function's contract.
        unsafe { add_assign(self.cpu, self.x.write(0..n_embd), y.read(0..n_embd)) };
    }

    /// # Safety
    /// `normed` is written; the thread's rows of `q`, `k` and `v` are its own.
    unsafe fn project(&self, thread: usize, share: &LayerShare) {
        let parts: [(&Matrix, &SharedF32); 3] = [
            (&share.wq, &self.q),
            (&share.wk, &self.k),
            (&share.wv, &self.v),
        ];
        let groups = |matrix: &Matrix| matrix.shape.n_rows.div_ceil(ROW_GROUP);
        let mine = self.part(thread, parts.iter().map(|part| groups(part.0)).sum(), 1);
        let mut first = 0;
        for (matrix, out) in parts {
            let end = first + groups(matrix);
            let part = mine.start.clamp(first, end) - first..mine.end.clamp(first, end) - first;
            let rows = part.start * ROW_GROUP..(part.end * ROW_GROUP).min(matrix.shape.n_rows);
            first = end;
            if !rows.is_empty() {
                // SAFETY: this function's contract.
                unsafe {
                    let x = self.normed.get().token(0);
                    gemv(self.cpu, matrix.view(), x, rows.clone(), out.write(rows));
                }
            }
        }
    }

    /// # Safety
    /// The projections are written.
    unsafe fn attention(&self, thread: usize, layer: usize, position: usize) {
        let shape = &self.weights.shape;
        let (head_dim, per_kv) = (shape.head_dim, shape.heads_per_kv());
        let n_chunks = (position + 1).div_ceil(CHUNK_POSITIONS);
        let states_len = per_kv * state_len(head_dim);
        let row_bytes = KvType::F16.row_bytes(head_dim);
        let matrix_bytes = row_bytes * shape.n_ctx;
        // SAFETY: this function's contract; a head is one thread's, its cache too.
        unsafe {
            let rotation = self.rotation.read(0..self.rope.row_len());
            for head in self.part(thread, shape.n_head_kv, 1) {
                let queries = head * per_kv * head_dim..(head + 1) * per_kv * head_dim;
                let kv = head * head_dim..(head + 1) * head_dim;
                let (q, k) = (self.q.write(queries.clone()), self.k.write(kv.clone()));
                self.rope.apply(self.cpu, rotation, q, head_dim);
                self.rope.apply(self.cpu, rotation, k, head_dim);
                let cache = self.caches[layer].get().as_ptr().cast_mut();
                let keys = cache.add(2 * head * matrix_bytes);
                let values = keys.add(matrix_bytes);
                let row = |start: *mut u8| {
                    std::slice::from_raw_parts_mut(start.add(position * row_bytes), row_bytes)
                };
                append(self.cpu, KvType::F16, k, row(keys));
                append(self.cpu, KvType::F16, self.v.read(kv), row(values));
                let seen =
                    |start: *mut u8| std::slice::from_raw_parts(start, (position + 1) * row_bytes);
                let kv = KvHead {
                    kv_type: KvType::F16,
                    head_dim,
                    k: seen(keys),
                    v: seen(values),
                };
                let states = self
                    .states
                    .write(head * n_chunks * states_len..(head + 1) * n_chunks * states_len);
                reset_states(states, head_dim);
                let queries_of = Queries {
                    values: q,
                    stride: q.len(),
                    n_tokens: 1,
                    n_heads: per_kv,
                    first_position: position,
                    window: None,
                };
                for (chunk, states) in states.chunks_exact_mut(states_len).enumerate() {
                    attend_chunk(self.cpu, kv, queries_of, chunk, shape.attn_scale, states);
                }
                join_chunks(self.cpu, head_dim, states, self.heads.write(queries));
            }
        }
    }

    /// # Safety
    /// `normed` is written.
    unsafe fn ffn(&self, thread: usize, share: &LayerShare) {
        let FfnShare::Neurons { up, rows } = &share.ffn else {
            unreachable!("the demo model has neuron rows")
        };
        // SAFETY: this function's contract.
        unsafe {
            match up {
                UpRows::Paired => self.sparse(thread, share, rows),
                UpRows::Interleaved(up) => self.dense(thread, share, up, rows),
            }
        }
    }

    /// # Safety
    /// `normed` is written.
    unsafe fn sparse(&self, thread: usize, share: &LayerShare, rows: &NeuronStore) {
        let up_rows = rows.up_rows().expect("records have up rows");
        let neurons = self.part(thread, share.neurons.len(), ROW_GROUP);
        // SAFETY: the thread's neurons and list are its own until it meets the others.
        unsafe {
            let x = self.normed.get().token(0);
            let (ids, values) = self.lists[thread].get_mut();
            let gate = self.gate.write(neurons.clone());
            gemv(self.cpu, share.gate.view(), x, neurons.clone(), gate);
            ids.clear();
            values.clear();
            gate_active(gate, neurons.start as u32, ids, values);
            self.meet();
            let all = self.all[thread].get_mut();
            all.0.clear();
            all.1.clear();
            for list in &self.lists {
                let (ids, values) = list.get();
                all.0.extend_from_slice(ids);
                all.1.extend_from_slice(values);
            }
            let mine = self.part(thread, all.0.len(), 1);
            let columns = self.part(thread, self.weights.shape.n_embd, BLOCK);
            let beside = ask_for_down(rows.down_rows(), columns, &all.0, mine.len());
            let out = self.act.write(mine.clone());
            up_active(
                self.cpu,
                up_rows,
                x,
                &all.0[mine.clone()],
                &all.1[mine],
                out,
                beside,
            );
            self.meet();
            self.down(thread, rows, &all.0);
        }
    }

    /// # Safety
    /// `normed` is written.
    unsafe fn dense(&self, thread: usize, share: &LayerShare, up: &Matrix, rows: &NeuronStore) {
        let neurons = self.part(thread, share.neurons.len(), ROW_GROUP);
        // SAFETY: the thread's neurons are its own until it meets the others.
        unsafe {
            let x = self.normed.get().token(0);
            let (gate, up_out) = (
                self.gate.write(neurons.clone()),
                self.up.write(neurons.clone()),
            );
            gemv(self.cpu, share.gate.view(), x, neurons.clone(), gate);
            gemv(self.cpu, up.view(), x, neurons.clone(), up_out);
            relu_mul(self.cpu, gate, up_out, self.act.write(neurons));
            self.meet();
            let all = self.all[thread].get_mut();
            if all.0.len() != share.neurons.len() {
                all.0.extend(0..share.neurons.len() as u32);
            }
            self.down(thread, rows, &all.0);
        }
    }

    /// # Safety
    /// The activations of `ids` are written.
    unsafe fn down(&self, thread: usize, rows: &NeuronStore, ids: &[u32]) {
        let boundaries = &self.weights.neuron_groups;
        let mut from = 0;
        let spans: [GroupSpan; FFN_GROUPS] = std::array::from_fn(|group| {
            let end = boundaries[group + 1];
            let to = from + ids[from..].partition_point(|&id| (id as usize) < end);
            let span = from..to;
            from = to;
            GroupSpan { group, span }
        });
        let columns = self.part(thread, self.weights.shape.n_embd, BLOCK);
        // SAFETY: this function's contract; the columns are this thread's.
        unsafe {
            let act = self.act.read(0..ids.len());
            let out = self.sum.write(columns.clone());
            down_active(
                self.cpu,
                rows.down_rows(),
                ids,
                act,
                &spans,
                columns,
                &mut [out],
            );
        }
    }
}
