//! Products, factors and leading directions of dense matrices, on several threads, with the same bits for any number of them.
//!
//! What is fitted to a wide model's hidden states would take hours on one thread: Cholesky's factor of an `[8192, 8192]` matrix is 180
//! billion products, and what is solved with it more. So work is cut into blocks, whose sizes do not depend on the threads; each is one
//! thread's, and nearly all of it is [`nalgebra`]'s product of two matrices, which is fast.

mod directions;
mod lower;
mod products;

pub(crate) use directions::{leading_directions, n_tracked};
pub(crate) use lower::Lower;
pub use products::Workers;
pub(crate) use products::{
    centred, covariance, multiply, product, times_transposed, transposed, view, view_mut, view_t,
    whole,
};
