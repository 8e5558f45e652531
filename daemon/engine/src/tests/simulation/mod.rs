//! Every operation with every other, and random ones, while clients disconnect and daemons die.

mod action;
mod guarantees;
mod pairs;
mod random;
mod world;
