//! The CUDA kernels against the scalar ones, on random inputs. Where there is no GPU every test says so and passes.

#[path = "cuda/attention.rs"]
mod attention;
#[path = "cuda/attention_batch.rs"]
mod attention_batch;
#[path = "cuda/batch.rs"]
mod batch;
#[path = "cuda/common.rs"]
mod common;
#[path = "cuda/device.rs"]
mod device;
#[path = "cuda/ffn.rs"]
mod ffn;
#[path = "cuda/fit.rs"]
mod fit;
#[path = "cuda/gemm.rs"]
mod gemm;
#[path = "cuda/hand_off.rs"]
mod hand_off;
#[path = "cuda/predict.rs"]
mod predict;
#[path = "cuda/replan.rs"]
mod replan;
#[path = "cuda/rows.rs"]
mod rows;
#[path = "cuda/sample.rs"]
mod sample;
#[path = "cuda/streamed.rs"]
mod streamed;
#[path = "cuda/then_norm.rs"]
mod then_norm;
