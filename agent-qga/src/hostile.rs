//! Hostile bytes of a guest agent: what the campaigns in the tests share.
//!
//! `cargo xtask fuzz hostile` runs them long and collects their figures.

use tests::hostile::Dice;

/// Pieces of what an agent says, whole, torn or none it would say.
pub(crate) const PIECES: [&[u8]; 16] = [
    b"{\"return\": {}}\n",
    b"{\"return\": {\"a\": [1, 2]}}\n",
    b"{\"error\": {\"class\": \"CommandNotFound\", \"desc\": \"x\"}}\n",
    b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"x\"}}\n",
    b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\ud800\"}}\n",
    b"{\"return\": 1, \"error\": {}}\n",
    b"[1000000]\n",
    b"{\"ret",
    b"urn\": 1}\n",
    b"\xFF",
    b"\n",
    b" \r\n",
    b"[[[[[[[[[[",
    b"\"\\\"",
    b"\xC3",
    b"\0",
];

/// A few of them, some of them torn, turned over or made up.
pub(crate) fn bytes(dice: &mut Dice) -> Vec<u8> {
    let mut bytes = Vec::new();
    for _ in 0..=dice.below(3) {
        let from = bytes.len();
        if dice.below(4) == 0 {
            dice.noise(&mut bytes);
        } else {
            bytes.extend(dice.pick(&PIECES));
        }
        dice.spoil(&mut bytes, from);
    }
    bytes
}
