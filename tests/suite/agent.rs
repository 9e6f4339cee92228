//! A real `qemu-ga` in a real guest with a real ext4: freezes that end, stopped and killed agents, answers that come
//! too late, files, programs, and every command the agent has.
//!
//! The agent's channel is not the driver's here but the test's own, so that connections can be made and dropped as the
//! test likes; the driver keeps the monitor.

mod bench;
mod content;
mod dropping;
mod freezing;
mod session;

use crate::harness::tests;

use self::content::{
    a_program_is_heard_while_it_runs, a_shutdown_answered_by_silence_ends_by_its_event,
    an_agent_cuts_output_at_sixteen_mebibytes_and_says_so, every_command_of_the_agent_is_typed,
    files_go_in_and_out_with_their_digest,
};
use self::dropping::every_future_dropped_at_every_poll_of_a_real_agent_leaves_a_sound_one;
pub(crate) use self::freezing::freezer;
use self::freezing::{
    a_dropped_freeze_of_a_real_ext4_is_thawed,
    a_freeze_of_a_real_ext4_is_thawed_when_its_time_is_over,
    a_freeze_that_is_not_ours_is_reported_and_stays,
    a_freeze_whose_process_was_killed_is_thawed_by_the_next,
    a_frozen_agent_is_told_from_one_that_lacks_the_command,
};
use self::session::{
    a_late_answer_does_not_reach_the_next_client,
    a_message_that_a_stopped_agent_takes_half_of_spoils_nothing,
    a_paused_guest_costs_a_deadline_and_answers_after_it,
    a_second_client_meets_silence_until_the_first_has_left,
    an_agent_killed_in_the_guest_is_found_again,
    an_agent_stopped_in_the_guest_costs_deadlines_and_no_answer_goes_astray,
};

tests! {
    a_dropped_freeze_of_a_real_ext4_is_thawed,
    a_freeze_of_a_real_ext4_is_thawed_when_its_time_is_over,
    a_freeze_whose_process_was_killed_is_thawed_by_the_next,
    a_freeze_that_is_not_ours_is_reported_and_stays,
    a_frozen_agent_is_told_from_one_that_lacks_the_command,
    an_agent_stopped_in_the_guest_costs_deadlines_and_no_answer_goes_astray,
    a_late_answer_does_not_reach_the_next_client,
    a_message_that_a_stopped_agent_takes_half_of_spoils_nothing,
    a_second_client_meets_silence_until_the_first_has_left,
    an_agent_killed_in_the_guest_is_found_again,
    a_paused_guest_costs_a_deadline_and_answers_after_it,
    files_go_in_and_out_with_their_digest,
    every_future_dropped_at_every_poll_of_a_real_agent_leaves_a_sound_one,
    a_program_is_heard_while_it_runs,
    an_agent_cuts_output_at_sixteen_mebibytes_and_says_so,
    every_command_of_the_agent_is_typed,
    a_shutdown_answered_by_silence_ends_by_its_event,
}
