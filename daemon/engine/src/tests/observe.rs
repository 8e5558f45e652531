//! Changes by other programs.

use loopd_common::{ErrorKind, Lifetime};

use super::harness::{Client, Harness};

#[tokio::test(start_paused = true)]
async fn changes_by_other_programs_are_observed() {
    let harness = Harness::with_udev();
    let before = harness.machine.attach_elsewhere(1);
    harness.engine.resync().await;
    let foreign = harness.engine.list();
    assert_eq!((foreign.len(), foreign[0].ownership.as_ref()), (1, None));
    let later = harness.machine.attach_elsewhere(1);
    harness.settle().await;
    assert_eq!(harness.engine.list().len(), 2);
    harness.agree();
    harness.machine.detach_elsewhere(before);
    harness.settle().await;
    let located = harness.engine.locate(later).await.unwrap();
    harness.engine.detach(located.id, false).await.unwrap();
    assert_eq!(harness.engine.locate(later).await.unwrap_err().kind(), ErrorKind::NotFound);

    let ours = harness.attach(&Client::new(":1.1", 7), Lifetime::Persistent).await.unwrap();
    harness.machine.detach_elsewhere(ours.device.number);
    harness.assert_empty().await;
}
