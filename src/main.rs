//! The `warpo` command. All of it is in [`warpo::cli`].

fn main() {}
