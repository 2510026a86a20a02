//! The tree of a template.

use super::chars::Chars;

/// An expression. Literals hold text that the template wrote.
#[derive(Debug)]
pub enum Expr {
    Undefined,
    None,
    Bool(bool),
    Integer(i64),
    Number(f64),
    Text(Chars),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    /// `a.b`
    Attribute(Box<Expr>, String),
    /// `a[b]`
    Item(Box<Expr>, Box<Expr>),
    /// `a[b:c:d]`
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Arguments),
    Filter(Box<Expr>, String, Arguments),
    /// `a is b`, or `a is not b` if true.
    Test(Box<Expr>, String, Arguments, bool),
    Not(Box<Expr>),
    Negative(Box<Expr>),
    Binary(&'static str, Box<Expr>, Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    /// `a < b <= c`
    Compare(Box<Expr>, Vec<(&'static str, Expr)>),
    /// `a if b else c`
    If(Box<Expr>, Box<Expr>, Box<Expr>),
}

/// What a call is given.
#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
    /// `*list` and `**dict`.
    pub spread: [Option<Box<Expr>>; 2],
}

/// What a loop or a `set` assigns to.
#[derive(Debug)]
pub enum Target {
    Name(String),
    /// `namespace.attribute`
    Attribute(String, String),
    Many(Vec<Target>),
}

/// A statement and its line.
#[derive(Debug)]
pub struct Stmt {
    pub line: usize,
    pub kind: StmtKind,
}

/// What a statement does.
#[derive(Debug)]
pub enum StmtKind {
    Data(Chars),
    Print(Expr),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    For(Box<ForLoop>),
    Set(Target, Expr),
    /// A block whose output is the value, after these filters.
    SetBlock(Target, Vec<(String, Arguments)>, Vec<Stmt>),
    Macro(usize),
    /// The call, and the macro that is its `caller`.
    CallBlock(Expr, usize),
    FilterBlock(Vec<(String, Arguments)>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    /// What a model writes.
    Generation(Vec<Stmt>),
    Break,
    Continue,
}

/// `for target in items if condition`
#[derive(Debug)]
pub struct ForLoop {
    pub target: Target,
    pub items: Expr,
    pub condition: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
}

/// A macro, or the body of a `call` block.
#[derive(Debug)]
pub struct MacroDef {
    pub name: String,
    pub parameters: Vec<(String, Option<Expr>)>,
    pub body: Vec<Stmt>,
}

/// A template's tree.
#[derive(Debug, Default)]
pub struct Tree {
    pub body: Vec<Stmt>,
    pub macros: Vec<MacroDef>,
    /// It has `generation` blocks.
    pub generates: bool,
}
