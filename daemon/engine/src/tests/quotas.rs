//! Limits for each uid.

use loopd_common::{ErrorKind, Lifetime};

use super::harness::{Client, Harness};
use crate::Settings;

#[tokio::test(start_paused = true)]
async fn one_uid_cannot_use_up_a_limit_of_all() {
    let harness = Harness::with_udev();
    let greedy = Client::new(":1.1", 7);
    let limit = Settings::default().attachments.each;
    for _ in 0..limit {
        harness.attach(&greedy, Lifetime::Client).await.unwrap();
    }
    let error = harness.attach(&greedy, Lifetime::Client).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitExceeded);
    harness.attach(&Client::new(":1.2", 8), Lifetime::Client).await.unwrap();
    greedy.disconnect(&harness.engine);
    harness.settle().await;
    assert_eq!(harness.engine.list().len(), 1);
    harness.attach(&greedy.again(), Lifetime::Client).await.unwrap();
}
