//! All functions of an image, fetched together: a function fetched lazily beside a kernel that spins would wait
//! for it.

use std::ffi::CString;

use cudarc::driver::{result, sys};

use super::attention_batch;
use super::device::call;
use super::gemm;
use super::layout::SUPPORTED;
use crate::activations::ActivationMode;
use crate::attention::KvType;
use crate::error::KernelError;
use crate::quant::QuantType;

/// Query heads that share a block in `attend`, ascending: one kernel each.
pub(super) const ATTEND_HEADS: [usize; 3] = [1, 2, 4];
/// Values of a head for which there are `attend_group` and `attend_lone`, ascending.
pub(super) const ATTEND_GROUP_DIMS: [usize; 2] = [64, 128];

/// Threads of a block of the `rows` kernels.
pub(super) const ROWS_THREADS: usize = 128;

/// Threads of a block of the `rows_then_norm` kernels.
pub(super) const ROWS_THEN_NORM_THREADS: usize = 512;

/// A kernel of the loaded image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(pub(super) sys::CUfunction);

/// A kernel of which no more blocks should be launched than there is room for.
#[derive(Debug, Clone, Copy)]
pub(super) struct ResidentFunction {
    pub(super) function: Function,
    /// Blocks that a multiprocessor holds at a time.
    pub(super) blocks_per_multiprocessor: usize,
}

/// Kernels that take several tokens.
#[derive(Debug)]
pub(super) struct PrefillFunctions {
    /// By place in [`SUPPORTED`] and in [`gemm::TILES`].
    gemm: Vec<Vec<Function>>,
    /// f16 and f32 caches: f32 and 8-bit arithmetic.
    attend: [[Function; 2]; 2],
    pub(super) prepare_batch: Function,
    pub(super) rms_norm_batch: Function,
    pub(super) gate_up_batch: Function,
    pub(super) unpack: Function,
    pub(super) unpack_k: Function,
    pub(super) unpack_planes: Function,
    /// To f32 and to f16, by place in [`SUPPORTED`].
    transpose: [Vec<Function>; 2],
}

/// Kernels that predictors are fitted with.
#[derive(Debug)]
pub(super) struct FitFunctions {
    pub(super) product: Function,
    pub(super) long_product: Function,
    pub(super) double_product: Function,
    pub(super) rows: Function,
    pub(super) join: Function,
    pub(super) errors: Function,
    pub(super) columns: Function,
    pub(super) adam: Function,
}

/// Every kernel.
#[derive(Debug)]
pub(super) struct Functions {
    /// By place in [`SUPPORTED`]: f32 and 8-bit activations (the same for float weights).
    rows: Vec<[ResidentFunction; 2]>,
    /// By place in [`SUPPORTED`], of those that are quantised.
    row_pairs: Vec<Option<ResidentFunction>>,
    rows_then_norm: Vec<Option<ResidentFunction>>,
    down: Vec<Function>,
    embed: Vec<Function>,
    /// f16 and f32 caches, by place in [`ATTEND_HEADS`].
    attend: [Vec<Function>; 2],
    /// By place in [`ATTEND_GROUP_DIMS`].
    attend_group: Vec<Function>,
    /// f16 and f32 caches, likewise.
    attend_lone: [Vec<Function>; 2],
    pub(super) prefill: PrefillFunctions,
    pub(super) fit: FitFunctions,
    pub(super) compact: Function,
    pub(super) count_active: Function,
    pub(super) prepare: Function,
    pub(super) begin_token: Function,
    pub(super) hand_over: Function,
    pub(super) take_over: Function,
    pub(super) rms_norm: Function,
    pub(super) rope_append: Function,
    pub(super) argmax: Function,
    pub(super) top_k: Function,
    pub(super) mark_active: Function,
    pub(super) count_marks: Function,
    pub(super) scatter: Function,
    /// For tests.
    pub(super) trap: Function,
}

impl Functions {
    /// Fetches all functions of `module`.
    ///
    /// # Safety
    /// `module` is loaded in the current context.
    pub(super) unsafe fn fetch(module: sys::CUmodule) -> Result<Self, KernelError> {
        let get = |name: String| {
            let text = CString::new(name).expect("a name without zeros");
            // SAFETY: the module is loaded.
            let function = unsafe { result::module::get_function(module, text) };
            call("fetch a kernel", function).map(Function)
        };
        let each = |family: &str| -> Result<Vec<_>, _> {
            let name = |quant: &QuantType| get(format!("{family}_{}", quant.name()));
            SUPPORTED.iter().map(name).collect()
        };
        let resident = |name: String, threads: usize| {
            let function = get(name)?;
            // SAFETY: a function of the module.
            let blocks = unsafe {
                let threads = threads as i32;
                result::occupancy::max_active_block_per_multiprocessor(function.0, threads, 0)
            };
            let blocks = call("ask for a kernel's occupancy", blocks)?;
            Ok::<_, KernelError>(ResidentFunction {
                function,
                blocks_per_multiprocessor: blocks.max(1) as usize,
            })
        };
        let rows = |quant: &QuantType| -> Result<_, KernelError> {
            let f32 = resident(format!("rows_{}_f32", quant.name()), ROWS_THREADS)?;
            let q8 = match quant.is_quantised() {
                true => resident(format!("rows_{}_q8", quant.name()), ROWS_THREADS)?,
                false => f32,
            };
            Ok([f32, q8])
        };
        let quantised = |family: &str, threads: usize| -> Result<Vec<_>, _> {
            let name = |quant: &QuantType| {
                let name = format!("{family}_{}", quant.name());
                let there = quant.is_quantised();
                there.then(|| resident(name, threads)).transpose()
            };
            SUPPORTED.iter().map(name).collect()
        };
        let attend = |cache: &str| -> Result<Vec<_>, _> {
            let name = |heads: &usize| get(format!("attend_{cache}_{heads}"));
            ATTEND_HEADS.iter().map(name).collect()
        };
        let attend_lone = |cache: &str| -> Result<Vec<_>, _> {
            let name = |dim: &usize| get(format!("attend_lone_{cache}_{dim}"));
            ATTEND_GROUP_DIMS.iter().map(name).collect()
        };
        Ok(Self {
            prefill: PrefillFunctions::fetch(&get)?,
            fit: FitFunctions::fetch(&get)?,
            rows: SUPPORTED.iter().map(rows).collect::<Result<_, _>>()?,
            row_pairs: quantised("row_pairs", ROWS_THREADS)?,
            rows_then_norm: quantised("rows_then_norm", ROWS_THEN_NORM_THREADS)?,
            down: each("down")?,
            embed: each("embed")?,
            attend: [attend("f16")?, attend("f32")?],
            attend_group: ATTEND_GROUP_DIMS
                .iter()
                .map(|dim| get(format!("attend_group_{dim}")))
                .collect::<Result<_, _>>()?,
            attend_lone: [attend_lone("f16")?, attend_lone("f32")?],
            compact: get("compact".to_owned())?,
            count_active: get("count_active".to_owned())?,
            prepare: get("prepare".to_owned())?,
            begin_token: get("begin_token".to_owned())?,
            hand_over: get("hand_over".to_owned())?,
            take_over: get("take_over".to_owned())?,
            rms_norm: get("rms_norm".to_owned())?,
            rope_append: get("rope_append".to_owned())?,
            argmax: get("argmax".to_owned())?,
            top_k: get("top_k".to_owned())?,
            mark_active: get("mark_active".to_owned())?,
            count_marks: get("count_marks".to_owned())?,
            scatter: get("scatter".to_owned())?,
            trap: get("trap".to_owned())?,
        })
    }

    fn place(quant: QuantType) -> usize {
        let place = SUPPORTED.iter().position(|&other| other == quant);
        place.expect("rows are of a supported format")
    }

    pub(super) fn rows(&self, quant: QuantType, mode: ActivationMode) -> ResidentFunction {
        self.rows[Self::place(quant)][usize::from(mode == ActivationMode::Q8)]
    }

    pub(super) fn row_pairs(&self, quant: QuantType) -> ResidentFunction {
        self.row_pairs[Self::place(quant)].expect("rows are quantised")
    }

    pub(super) fn rows_then_norm(&self, quant: QuantType) -> ResidentFunction {
        self.rows_then_norm[Self::place(quant)].expect("rows are quantised")
    }

    pub(super) fn down(&self, quant: QuantType) -> Function {
        self.down[Self::place(quant)]
    }

    pub(super) fn embed(&self, quant: QuantType) -> Function {
        self.embed[Self::place(quant)]
    }

    /// `place` is one in [`ATTEND_GROUP_DIMS`].
    pub(super) fn attend_group(&self, place: usize) -> Function {
        self.attend_group[place]
    }

    /// `place` is one in [`ATTEND_GROUP_DIMS`].
    pub(super) fn attend_lone(&self, cache: KvType, place: usize) -> Function {
        self.attend_lone[usize::from(cache == KvType::F32)][place]
    }

    /// `place` is one in [`ATTEND_HEADS`].
    pub(super) fn attend(&self, cache: KvType, place: usize) -> Function {
        self.attend[usize::from(cache == KvType::F32)][place]
    }
}

impl FitFunctions {
    /// `get` fetches the kernel of a name.
    fn fetch(get: &dyn Fn(String) -> Result<Function, KernelError>) -> Result<Self, KernelError> {
        Ok(Self {
            product: get("fit_product".to_owned())?,
            long_product: get("fit_long_product".to_owned())?,
            double_product: get("fit_double_product".to_owned())?,
            rows: get("fit_rows".to_owned())?,
            join: get("fit_join".to_owned())?,
            errors: get("fit_errors".to_owned())?,
            columns: get("fit_columns".to_owned())?,
            adam: get("fit_adam".to_owned())?,
        })
    }
}

impl PrefillFunctions {
    /// `get` fetches the kernel of a name.
    fn fetch(get: &dyn Fn(String) -> Result<Function, KernelError>) -> Result<Self, KernelError> {
        let with_shared = |name: String, bytes: usize| {
            let function = get(name)?;
            use sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as SHARED;
            // SAFETY: a function of the module.
            let answer = unsafe {
                result::function::set_function_attribute(function.0, SHARED, bytes as i32)
            };
            call("set a kernel's shared memory", answer)?;
            Ok::<_, KernelError>(function)
        };
        let gemm = |quant: &QuantType| -> Result<Vec<_>, _> {
            let name = |tile: &gemm::Tile| {
                let name = format!("gemm_{}_{}", quant.name(), tile.name);
                with_shared(name, tile.shared_bytes)
            };
            gemm::TILES.iter().map(name).collect()
        };
        let attend = |name: &str| {
            let name = format!("attend_batch_{name}");
            with_shared(name, attention_batch::SHARED_BYTES_MAX)
        };
        let transpose = |to: &str| -> Result<Vec<_>, _> {
            let name = |quant: &QuantType| get(format!("transpose_{to}_{}", quant.name()));
            SUPPORTED.iter().map(name).collect()
        };
        Ok(Self {
            gemm: SUPPORTED.iter().map(gemm).collect::<Result<_, _>>()?,
            attend: [
                [attend("f16_split")?, attend("f16")?],
                [attend("f32_split")?, attend("f32")?],
            ],
            prepare_batch: get("prepare_batch".to_owned())?,
            rms_norm_batch: get("rms_norm_batch".to_owned())?,
            gate_up_batch: get("gate_up_batch".to_owned())?,
            unpack: get("unpack".to_owned())?,
            unpack_k: get("unpack_k".to_owned())?,
            unpack_planes: get("unpack_planes".to_owned())?,
            transpose: [transpose("f32")?, transpose("f16")?],
        })
    }

    /// `place` is one in [`gemm::TILES`].
    pub(super) fn gemm(&self, quant: QuantType, place: usize) -> Function {
        self.gemm[Functions::place(quant)][place]
    }

    /// Rows of `quant` to what `mode` multiplies.
    pub(super) fn transpose(&self, quant: QuantType, mode: ActivationMode) -> Function {
        self.transpose[usize::from(mode == ActivationMode::Q8)][Functions::place(quant)]
    }

    pub(super) fn attend(&self, cache: KvType, mode: ActivationMode) -> Function {
        self.attend[usize::from(cache == KvType::F32)][usize::from(mode == ActivationMode::Q8)]
    }
}
