//! Instruction sets, chosen at run time.
//!
//! Ops write plain Rust in a [`simd!`](crate::simd) function, which is compiled once per
//! instruction set. Because every multiply-add is an explicit `mul_add` and every reduction names
//! its lanes, all versions give the same bits.

#![allow(unsafe_code)]

/// An instruction set that this machine has. Values can only be made by asking the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Isa(Level);

/// Not public to construct: code for a level must not run where the level is missing.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Portable,
    Avx2,
    Avx512,
}

impl Isa {
    /// Plain Rust for any machine. Slow where the processor lacks a fused multiply-add.
    pub const fn portable() -> Self {
        Self(Level::Portable)
    }

    /// The best of this machine.
    pub fn detect() -> Self {
        *Self::available().last().unwrap_or(&Self::portable())
    }

    /// All that this machine has, the slowest first.
    pub fn available() -> &'static [Self] {
        const ALL: [Isa; 3] = [Isa(Level::Portable), Isa(Level::Avx2), Isa(Level::Avx512)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            &ALL[..1 + usize::from(avx2) + usize::from(avx512)]
        }
        #[cfg(not(target_arch = "x86_64"))]
        &ALL[..1]
    }

    #[doc(hidden)]
    pub fn level(self) -> Level {
        self.0
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Level::Portable => "portable",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
        })
    }
}

/// Defines a function whose first argument is an [`Isa`] and whose body is compiled for each:
///
/// ```
/// warpo::simd! {
///     /// `y = a x + y`
///     fn axpy[F: warpo::device::Float](y: &mut [F], a: F, x: &[F]) {
///         for (y, x) in y.iter_mut().zip(x) {
///             *y = a.mul_add(*x, *y);
///         }
///     }
/// }
/// let mut y = [1.0f32, 2.0];
/// axpy(warpo::device::cpu::Isa::detect(), &mut y, 2.0, &[10.0, 20.0]);
/// assert_eq!(y, [21.0, 42.0]);
/// ```
///
/// Functions called inside must be `#[inline(always)]`, or they are compiled without the set.
#[macro_export]
macro_rules! simd {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $([$($g:ident : $bound:path),*])? (
        $($arg:ident : $ty:ty),* $(,)?
    ) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        #[allow(unsafe_code, clippy::too_many_arguments)]
        $vis fn $name $(<$($g: $bound),*>)? (
            isa: $crate::device::cpu::Isa, $($arg: $ty),*
        ) $(-> $ret)? {
            #[inline(always)]
            fn body $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn avx512 $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$($g: $bound),*>)? ($($arg: $ty),*) $(-> $ret)? {
                body($($arg),*)
            }
            match isa.level() {
                // SAFETY: an `Isa` of this level exists only where the features were detected.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::device::cpu::simd::Level::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    )*};
}
