//! Reproducible random numbers.

/// Sebastiano Vigna's `SplitMix64`.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number from `first` to `last`.
    pub fn within(&mut self, first: u32, last: u32) -> u32 {
        let count = u64::from(last - first) + 1;
        first + u32::try_from(self.next() % count).unwrap()
    }

    pub fn index(&mut self, first: usize, last: usize) -> usize {
        let limit = |number| u32::try_from(number).unwrap();
        self.within(limit(first), limit(last)) as usize
    }

    pub fn byte(&mut self) -> u8 {
        u8::try_from(self.within(0, 255)).unwrap()
    }

    pub fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.index(0, values.len() - 1)]
    }
}
