//! What all losses over tokens share: a loss is a pure function of one token's columns, written
//! once here, in f64, and once in CUDA (`kernels/include/token_loss.cuh`). Everything else (shapes,
//! weights, absent columns, sums, launch, profile) is in this file.
//!
//! # To add a loss
//!
//! 1. `src/ops/<name>.rs`: name its sums with [`sums!`], write the function of a token, and a
//!    `forward` that lists columns and gradients in a [`TokenLoss`] and runs it.
//! 2. `kernels/<name>.cu`: the same function as a functor, and one `KERNEL` that calls
//!    `token_loss`. Its sums have the order of the Rust struct.
//! 3. `tests/ops/<name>.rs`: hand-worked tokens, central differences, the kernel against the CPU.
//!
//! A token's gradients and sums are multiplied by its weight, 1 without such a column, so the first
//! sum, for which every function gives 1, is the weight of all tokens. A maximum has no weight.

use crate::{
    device::{
        Cuda, Device, Float, Pending, View, ViewMut, Work,
        cuda::{Launch, Parts},
    },
    error::Result,
    shape,
};

/// Named sums over tokens, `N` in all. They merge over micro-batches.
pub trait Sums<const N: usize>: Copy + Default + Send + 'static {
    /// How many of the last are maxima, of numbers of at least 0.
    const MAXIMA: usize;
    fn of(sums: [f64; N]) -> Self;
    /// Adds those of a token of this weight.
    fn add(&mut self, weight: f64, token: &Self);
}

/// A struct of named sums, with the maximum, if there is one, after a semicolon.
macro_rules! sums {
    ($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$of_sum:meta])* $sum:ident,)+ $(; $(#[$of_max:meta])* $max:ident,)?
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq)]
        pub struct $name {
            $($(#[$of_sum])* pub $sum: f64,)+
            $($(#[$of_max])* pub $max: f64,)?
        }

        impl $name {
            const N: usize = [$(stringify!($sum),)+ $(stringify!($max),)?].len();

            /// Adds those of the next micro-batch.
            pub fn merge(&mut self, next: &Self) {
                $crate::ops::token_loss::Sums::add(self, 1.0, next);
            }
        }

        impl $crate::ops::token_loss::Sums<{ Self::N }> for $name {
            const MAXIMA: usize = 0 $(+ [stringify!($max)].len())?;

            fn of([$($sum,)+ $($max,)?]: [f64; Self::N]) -> Self {
                Self { $($sum,)+ $($max,)? }
            }

            #[inline(always)]
            fn add(&mut self, weight: f64, token: &Self) {
                $(self.$sum += weight * token.$sum;)+
                // `f64::max` would drop a NaN.
                $(self.$max = $crate::device::Float::max_nan(self.$max, token.$max);)?
            }
        }
    };
}
pub(super) use sums;

/// A column that a loss reads: element `first + t * step` of the view is token `t`'s.
#[derive(Clone, Copy, Debug)]
pub(super) struct Input<'a, F> {
    name: &'static str,
    /// The token's number is 0 without.
    view: Option<View<'a, F>>,
    needed: bool,
    first: usize,
    step: usize,
}

impl<'a, F> Input<'a, F> {
    pub fn new(name: &'static str, view: View<'a, F>) -> Self {
        Self::optional(name, Some(view), true)
    }

    /// A column that may be absent, unless it is `needed`.
    pub fn optional(name: &'static str, view: Option<View<'a, F>>, needed: bool) -> Self {
        Self { name, view, needed, first: 0, step: 1 }
    }

    /// Element `first` of each token in a column of `step` elements a token.
    pub fn of_many(self, first: usize, step: usize) -> Self {
        Self { first, step, ..self }
    }
}

/// A loss over tokens: what it reads, and the gradients that it writes.
pub(super) struct TokenLoss<'a, F, const IN: usize, const GRADS: usize> {
    pub op: &'static str,
    pub tokens: usize,
    pub inputs: [Input<'a, F>; IN],
    pub weights: Option<View<'a, F>>,
    /// Names and memory; a gradient that nobody asks for is not written.
    pub grads: [(&'static str, Option<ViewMut<'a, F>>); GRADS],
}

/// What a kernel is launched with.
pub(super) struct TokenLaunch<'a, F, const GRADS: usize> {
    pub cuda: &'a Cuda,
    pub launch: Launch,
    pub grads: [Option<ViewMut<'a, F>>; GRADS],
    /// Sums of each block.
    pub partial: ViewMut<'a, f64>,
    /// Elements of a block.
    pub share: usize,
}

impl<F: Float, const IN: usize, const GRADS: usize> TokenLoss<'_, F, IN, GRADS> {
    /// Writes the gradients and returns the sums. `token` computes a token's `OUT` gradients and
    /// its sums from its inputs; `launch` launches the kernel that does the same. With fewer
    /// columns of gradients than `OUT`, a column has those of a token side by side.
    pub(super) fn run<S: Sums<N>, const OUT: usize, const N: usize>(
        self,
        dev: &Device,
        token: impl Fn([f64; IN]) -> ([f64; OUT], S),
        launch: impl FnOnce(TokenLaunch<'_, F, GRADS>) -> Result<()>,
    ) -> Result<Pending<S>> {
        let Self { op, tokens, inputs, weights, grads } = self;
        let per = OUT / GRADS;
        let weight = Input::optional("weights", weights, false);
        let mut elements = 0;
        let check = |name, step: usize, len: usize| match step {
            1 => shape::check(op, name, &[tokens], len),
            _ => shape::check(op, name, &[tokens, step], len),
        };
        for input in inputs.iter().chain([&weight]) {
            let len = input.view.map_or(0, |view| view.len());
            if input.needed || input.view.is_some() {
                check(input.name, input.step, len)?;
            }
            elements += if input.first == 0 { len } else { 0 };
        }
        for (name, grad) in &grads {
            let len = grad.as_ref().map_or(tokens * per, ViewMut::len);
            check(name, per, len)?;
            elements += grad.as_ref().map_or(0, ViewMut::len);
        }
        let _op = dev.op(op, || Work::moves::<F>(elements));
        let grads = grads.map(|(_, grad)| grad);
        match dev {
            Device::Cpu(_) => {
                let mut grads = grads.map(|grad| grad.map(ViewMut::host));
                let columns = inputs.map(|input| input.view.map(View::host));
                let weights = weights.map(View::host);
                let mut sums = S::default();
                for t in 0..tokens {
                    let x = std::array::from_fn(|k| {
                        let Input { first, step, .. } = inputs[k];
                        columns[k].map_or(0.0, |column| column[first + t * step].f64())
                    });
                    let weight = weights.map_or(1.0, |weights| weights[t].f64());
                    let (grad, more) = token(x);
                    sums.add(weight, &more);
                    for (k, d) in grad.into_iter().enumerate() {
                        if let Some(out) = &mut grads[k / per] {
                            out[t * per + k % per] = F::of(weight * d);
                        }
                    }
                }
                Ok(Pending::now(sums))
            }
            Device::Cuda(cuda) => {
                let sums =
                    cuda.sums(Parts::of(tokens * per), S::MAXIMA, |row, partial, share| {
                        launch(TokenLaunch { cuda, launch: row, grads, partial, share })
                    })?;
                Ok(sums.map(S::of))
            }
        }
    }
}
