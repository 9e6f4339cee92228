//! How far a migration is, as one line of text.

use remote_migrate::{Estimate, Eta, Progress};

const MIB: f64 = 1024.0 * 1024.0;
/// Of the bar, in characters.
const WIDTH: usize = 20;

/// The bar is the share of the memory that need not be sent any more: it falls back as a pass begins, so the pass is told
/// beside it.
pub(crate) fn line(now: &Progress) -> String {
    let transfer = now.transfer;
    let percent = transfer.percent();
    let full = (percent / 100.0 * WIDTH as f64) as usize;
    let (done, open) = ("#".repeat(full), ".".repeat(WIDTH - full));
    let rate = match now.estimate.rate {
        0 => String::new(),
        rate => format!(" at {:.1} MiB/s", rate as f64 / MIB),
    };
    let written = match transfer.pass {
        // Not measured before the second.
        ..=1 => String::new(),
        _ => format!(", {:.1} MiB/s written", transfer.dirty_rate as f64 / MIB),
    };
    format!(
        "[{done}{open}] {percent:5.1} %, pass {}, {:5.1} MiB sent{rate}{written}: {}",
        transfer.pass,
        transfer.sent as f64 / MIB,
        end(&now.estimate),
    )
}

fn end(estimate: &Estimate) -> String {
    match (estimate.eta, estimate.pass_left) {
        (Eta::In(left), _) => format!("over in {:.1} s", left.as_secs_f64()),
        (Eta::DoesNotConverge, _) => "does not converge".into(),
        (Eta::Unknown, Some(left)) => format!("this pass over in {:.1} s", left.as_secs_f64()),
        (Eta::Unknown, None) => "not measured yet".into(),
    }
}
